"""Plan a run and print the plan."""

import argparse
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from vlm_sft.checkpoint.components import dtype_of
from vlm_sft.config.method import METHODS, Method, training_method
from vlm_sft.config.schema import RunConfig
from vlm_sft.data.build import load_language
from vlm_sft.model.activation_checkpointing import POLICIES, Policy
from vlm_sft.planning.blueprint import require_local_tokenizer
from vlm_sft.planning.calibrate import Calibration, calibrate
from vlm_sft.planning.devices import find_device
from vlm_sft.planning.estimate import Estimator, Memory, host_images_per_second
from vlm_sft.planning.micro_batch import MicroBatch
from vlm_sft.planning.report import PlanReport, Way
from vlm_sft.planning.workload import Survey, Workload, images_per_cpu_second, plan_workload
from vlm_sft.planning.workload import survey as survey_data
from vlm_sft.train.checkpointing_policy import MARGIN
from vlm_sft.utils.console import Console, say_json

PACK_UNIT: Final = 256
"""The largest pack is searched in so many tokens."""

MOST: Final = 1024
"""Rows, and units of a pack, beyond which no larger one is looked for."""

WIDTH: Final = 160
"""Columns where the output is no terminal."""


def run(config: RunConfig, arguments: argparse.Namespace) -> int:
    """Print the plan of a configuration; returns 0, also where the run would not fit."""
    require_local_tokenizer(config.model.language_model)
    device = find_device(arguments.gpu, dtype_of(config))
    planner = Estimator(config, device, gpus=arguments.gpus, efficiency=arguments.efficiency)
    calibration = _calibration(planner) if arguments.calibrate else None
    chat_tokenizer = load_language(config).chat_tokenizer
    tower = planner.blueprint.tower
    found = survey_data(
        config, chat_tokenizer, num_image_tokens=tower.num_tokens, sample=arguments.sample
    )
    weight = planner.image_cost(training_method(config)) if config.train.packing else 0.0
    work = plan_workload(config, found, gpus=arguments.gpus, image_cost=weight)
    rate = None
    if config.data.feature_cache is None:
        rate = images_per_cpu_second(found.sources, tower.image_spec, config)
    outlook = _Outlook(planner, found, work, rate)
    report = PlanReport(
        config=arguments.config,
        device=device,
        gpus=arguments.gpus,
        efficiency=planner.efficiency,
        survey=found,
        work=work,
        images_per_cpu_second=rate,
        policies=outlook.policies(),
        ways=[outlook.best(method) for method in METHODS],
        unplanned=_unplanned(config, planner),
        calibration=calibration,
    )
    if arguments.json:
        say_json(report.as_json(), indent=2)
        return 0
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    report.print(console)
    return 0


def _calibration(planner: Estimator) -> Calibration:
    """Real steps; what they reach is what the plan for this machine goes on with."""
    config = planner.config
    asked = config.train.activation_checkpointing
    policy: Policy = "none" if asked == "auto" else asked  # a few steps are to run here anyhow
    found = calibrate(planner, training_method(config), policy)
    planner.efficiency = min(1.0, found.efficiency)
    return found


def _unplanned(config: RunConfig, planner: Estimator) -> list[str]:
    """What the configuration asks for and the plan does not know."""
    settings = {"train.compile": config.train.compile, "train.fp8": config.train.fp8}
    told = [
        f"{name}: not planned; bytes and time are those without"
        for name, on in settings.items()
        if on
    ]
    if config.optim.optimizer == "adamw_8bit" and planner.is_sharded("full"):
        told.append(
            "optim.optimizer: adamw_8bit does not go with weights that processes share out, so "
            "full training is planned with moments in float32"
        )
    return told


@dataclass
class _Outlook:
    """Ways of training, looked at one by one."""

    planner: Estimator
    survey: Survey
    work: Workload
    images_per_cpu_second: float | None

    def policies(self) -> list[Way]:
        """The configured method under every policy."""
        method, chosen = training_method(self.planner.config), self.policy
        ways = (self._way(method, policy) for policy in POLICIES)
        return [replace(way, configured=way.policy == chosen) for way in ways]

    @cached_property
    def policy(self) -> Policy:
        """The configured activation checkpointing; `auto`: what training's own rule would take."""
        asked = self.planner.config.train.activation_checkpointing
        if asked != "auto":
            return asked
        method = training_method(self.planner.config)
        return next((policy for policy in POLICIES if self._leaves_margin(method, policy)), "full")

    def _leaves_margin(self, method: Method, policy: Policy) -> bool:
        return self.planner.fits(self._memory(method, policy), margin=MARGIN)

    def best(self, method: Method) -> Way:
        """A method under the configured policy if it is configured, else the fastest that fits."""
        if method == training_method(self.planner.config):
            return self._sized(replace(self._way(method, self.policy), configured=True))
        for policy in POLICIES:
            way = self._way(method, policy)
            if way.fits:
                break
        return self._sized(way)

    def _memory(self, method: Method, policy: Policy) -> Memory:
        work = self.work
        return self.planner.memory(
            method, policy, work.largest, micro_batches=work.micro_batches_a_step
        )

    def _way(self, method: Method, policy: Policy) -> Way:
        planner, work, config = self.planner, self.work, self.planner.config
        memory = self._memory(method, policy)
        loaded = host_images_per_second(config, planner.gpus, self.images_per_cpu_second)
        return Way(
            method,
            policy,
            configured=False,
            memory=memory,
            fits=planner.fits(memory),
            speed=planner.speed(method, policy, work, images_per_second=loaded or None),
        )

    def _sized(self, way: Way) -> Way:
        """The same with the largest micro-batch, or pack where records are packed, that fits."""
        packed = self.planner.config.train.packing is not None
        make = self._pack if packed else self._longest
        found = self.planner.largest(way.method, way.policy, make, limit=MOST)
        if packed:
            return replace(way, largest_pack=found * PACK_UNIT)
        return replace(way, largest_micro_batch=found)

    def _longest(self, rows: int) -> MicroBatch:
        """So many records of the longest length, with targets and images as in the largest."""
        largest, longest = self.work.largest, self.survey.longest()
        targets = max(1, rows * largest.targets // largest.rows)
        images = -(-rows * largest.images // largest.rows)
        return MicroBatch(rows, longest, targets, images, rows, rows * longest**2)

    def _pack(self, units: int) -> MicroBatch:
        """One row of so many tokens, with records, targets and images in their proportions."""
        tokens = units * PACK_UNIT
        share = tokens / self.work.total("length")

        def part(what: str) -> int:
            return max(1, round(share * self.work.total(what)))

        return MicroBatch(
            1, tokens, part("targets"), part("images"), part("records"), part("attended")
        )
