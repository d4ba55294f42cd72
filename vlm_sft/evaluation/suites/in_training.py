"""Evaluate a suite during training, on all ranks."""

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from vlm_sft.config.schema import RunConfig
from vlm_sft.data.tokenize import ChatTokenizer
from vlm_sft.errors import ConfigError
from vlm_sft.evaluation.suites.answer_log import Answer
from vlm_sft.evaluation.suites.answering import BATCH_SIZE, LocalAnswerer, answer_all
from vlm_sft.evaluation.suites.config import SuiteConfig, load_suite
from vlm_sft.evaluation.suites.results import metrics, score_task
from vlm_sft.evaluation.suites.tasks import Key, Task, plan, read_task
from vlm_sft.inference.loaded_model import LoadedModel
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.train.compile import eager
from vlm_sft.train.distributed import raise_on_all_ranks, rank0_only
from vlm_sft.utils.dtensor import is_sharded
from vlm_sft.utils.progress import track


def read_training_suite(config: RunConfig) -> tuple[SuiteConfig, list[Task]] | None:
    """Read the suite of `train.eval_suite`, and check that `train.keep_best` is one of its metrics.

    Returns:
        The suite and its tasks; None if the run has none.

    Raises:
        UserError: The suite, a file or an image name cannot be used.
        ConfigError: No evaluation of the run has the metric.
    """
    if config.train.eval_suite is None:
        return None
    suite = load_suite(config.train.eval_suite)
    tasks = [read_task(task, seed=suite.seed) for task in suite.tasks]
    wanted, known = config.train.keep_best, [*metric_names(tasks), "eval_loss"]
    if wanted is not None and wanted not in known:
        raise ConfigError(
            f"train.keep_best: {config.train.eval_suite} has no metric {wanted!r}; expected one of "
            f"{', '.join(known)}"
        )
    return suite, tasks


def metric_names(tasks: Sequence[Task]) -> list[str]:
    """Return the names of all metrics of tasks, from scoring answers without text."""
    answers = {
        key: Answer(key.task, key.condition, key.id, None, "", "", 0)
        for task in tasks
        for condition in task.config.conditions
        for question in task.questions
        for key in [Key(task.config.name, condition, question.id)]
    }
    return list(metrics([score_task(task, answers, seed=0) for task in tasks]))


class TrainingSuite:
    """Answers a suite's questions with the model that is being trained.

    Questions are divided among the ranks, by batches. If the weights are sharded, every rank
    answers all of them, since all ranks have to take part in every step of the model.

    Args:
        config: The run's configuration.
        suite: The suite.
        tasks: Its tasks.
        model: The model, sharded or not; left in training mode.
        chat_tokenizer: Tokenizer and chat template.
        accelerator: Device, precision and ranks.
    """

    def __init__(
        self,
        config: RunConfig,
        suite: SuiteConfig,
        tasks: Sequence[Task],
        model: VisionLanguageModel,
        chat_tokenizer: ChatTokenizer,
        accelerator: Accelerator,
    ) -> None:
        loaded = LoadedModel(
            model=model,
            tokenizer=chat_tokenizer.tokenizer,
            chat_tokenizer=chat_tokenizer,
            image_spec=model.vision_tower.image_spec,
            image_aspect=config.data.image_aspect,
            image_processing=config.data.image_processing,
            config=config,
            manifest={},
        )
        sharded = is_sharded(model.parameters())
        self._model = model
        self._accelerator = accelerator
        self._compiled = config.train.compile
        self._suite, self._tasks = suite, tasks
        self._answerer = LocalAnswerer(loaded, whole_prompts=sharded)
        batches = plan(tasks, seed=suite.seed, batch_size=BATCH_SIZE)
        first, step = (0, 1) if sharded else (accelerator.process_index, accelerator.num_processes)
        self._batches = batches[first::step]

    def __call__(self) -> dict[str, float | None]:
        """Return every metric of the suite by name; the same on all ranks.

        Raises:
            Exception: Any error of any rank, on all ranks.
        """
        failure: Exception | None = None
        answers: list[Answer] = []
        self._model.eval()
        try:
            with torch.no_grad(), self._accelerator.autocast(), eager(self._compiled):
                answered = answer_all(self._answerer, self._batches, lambda _: False)
                if self._accelerator.is_main_process:
                    answered = track(answered, len(self._batches), "answering the suite, batches")
                for found in answered:
                    answers += found
        except Exception as error:  # raised below on every rank: the others would wait
            failure = error
        finally:
            self._model.train()
        raise_on_all_ranks(self._accelerator, failure)
        if self._accelerator.num_processes > 1:
            answers = gather_object(answers)
        return rank0_only(self._accelerator, lambda: self._scores(answers))

    def _scores(self, answers: Sequence[Answer]) -> dict[str, float | None]:
        by_key: Mapping[Key, Answer] = {answer.key: answer for answer in answers}
        seed = self._suite.seed
        found = [score_task(task, by_key, seed=seed) for task in self._tasks]
        return metrics(found)
