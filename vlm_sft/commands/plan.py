"""Plan a run and print the plan."""

import argparse
from typing import Final

from vlm_sft.config.method import training_method
from vlm_sft.config.schema import RunConfig
from vlm_sft.data.build import load_chat_tokenizer
from vlm_sft.model.activation_checkpointing import CheckpointPolicy
from vlm_sft.model.dtypes import DTYPES
from vlm_sft.planning.assumed import assumed_data_stats, parse_assumed
from vlm_sft.planning.calibrate import Calibration, calibrate
from vlm_sft.planning.data_stats import images_per_cpu_second, read_data_stats
from vlm_sft.planning.devices import find_device
from vlm_sft.planning.estimate import Estimator
from vlm_sft.planning.local_configs import known_shapes, require_local_tokenizer
from vlm_sft.planning.planner import Planner
from vlm_sft.planning.report import PlanReport
from vlm_sft.planning.step_stats import plan_steps
from vlm_sft.utils.console import Console, echo_json

FILE_WIDTH: Final = 160
"""Columns of the tables if the output is not a terminal."""


def run(config: RunConfig, arguments: argparse.Namespace) -> int:
    """Print the plan of a configuration; return 0, also if the run would not fit."""
    assumed = None if arguments.assume is None else parse_assumed(arguments.assume)
    if assumed is None:
        require_local_tokenizer(config.model.language_model)
    device = find_device(arguments.gpu, DTYPES[config.train.precision])
    estimator = Estimator(config, device, gpus=arguments.gpus, efficiency=arguments.efficiency)
    calibration = _calibrate(estimator) if arguments.calibrate else None

    tower = estimator.meta_model.tower
    if assumed is not None:
        data = assumed_data_stats(assumed, config)
    else:
        data = read_data_stats(
            config,
            load_chat_tokenizer(config),
            layout_rule=estimator.meta_model.layout_rule,
            sample=arguments.sample,
        )
    cost = estimator.image_cost(training_method(config)) if config.train.packing else 0.0
    steps = plan_steps(config, data, gpus=arguments.gpus, image_cost=cost)
    rate = None
    if config.data.feature_cache is None:
        rate = images_per_cpu_second(
            data.image_sources, estimator.meta_model.layout_rule, tower.image_spec, config
        )

    planner = Planner(estimator, data, steps, rate)
    report = PlanReport(
        config=arguments.config,
        device=device,
        gpus=arguments.gpus,
        efficiency=estimator.efficiency,
        data=data,
        steps=steps,
        images_per_cpu_second=rate,
        by_policy=planner.by_policy(),
        by_method=planner.by_method(),
        unsupported=[*known_shapes(config.model), *_unsupported_settings(config, estimator)],
        calibration=calibration,
    )
    if arguments.json:
        echo_json(report.as_json(), indent=2)
        return 0
    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    report.print(console)
    return 0


def _calibrate(estimator: Estimator) -> Calibration:
    """Measure a few real steps, and plan with the efficiency that they reach."""
    config = estimator.config
    configured = config.train.activation_checkpointing
    policy: CheckpointPolicy = "none" if configured == "auto" else configured
    calibration = calibrate(estimator, training_method(config), policy)
    estimator.efficiency = min(1.0, calibration.efficiency)
    return calibration


def _unsupported_settings(config: RunConfig, estimator: Estimator) -> list[str]:
    """Return a sentence for every configured setting that the plan does not consider."""
    settings = {"train.compile": config.train.compile, "train.fp8": config.train.fp8}
    sentences = [
        f"{name}: not planned; memory and time are those without it"
        for name, enabled in settings.items()
        if enabled
    ]
    if config.optim.optimizer == "adamw_8bit" and estimator.is_sharded("full"):
        sentences.append(
            "optim.optimizer: adamw_8bit does not work with sharded weights; full fine-tuning is "
            "planned with float32 moments"
        )
    return sentences
