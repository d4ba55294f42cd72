"""Ask all requests that have no answer yet, within `limits`; recorded answers are never lost.

The exit code is 0 when no more requests failed than `teacher.failures_allowed`, 3 when more did or
the server is down (repeat the command to ask them again), 4 when one of `limits` was reached, 130
or 143 after Ctrl-C or SIGTERM.
"""

import asyncio
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError

from data_tools.instruct.config import InstructConfig
from data_tools.instruct.generate.answers import Answers, AnswerWriter, Claims, answers_folder
from data_tools.instruct.generate.append_only import SharedLog
from data_tools.instruct.generate.progress import GenerationProgress, shown
from data_tools.instruct.generate.shard import ALL_REQUESTS, Shard
from data_tools.instruct.generate.teachers import Teacher, make_teacher
from data_tools.instruct.generate.teachers.cancellation import Cancellation, Cancelled
from data_tools.instruct.generate.teachers.spending import LimitReached, Spending
from data_tools.instruct.plan.command import read_requests
from data_tools.instruct.run_folder import RunFolder
from data_tools.instruct.schema import Answer, Failure, Request
from vlm_sft.errors import UserError
from vlm_sft.utils.console import echo

if TYPE_CHECKING:
    from data_tools.instruct.generate.teachers.batch import BatchTeacher

GRACE_SECONDS: Final = 10.0
"""After the first Ctrl-C, requests in flight have this many seconds to finish."""
_SYNC_SECONDS: Final = 1.0
"""Seconds between syncs: a power failure loses the answers of at most this time."""
_STREAK: Final = 20
"""Failures in a row after which the server counts as down; at least two per concurrent request."""
_LOOK_SECONDS: Final = 0.5
"""Seconds between checks whether other processes have answered the requests they claimed."""


def command(config: InstructConfig, shard: Shard = ALL_REQUESTS) -> None:
    """Ask all requests that have no answer yet.

    Args:
        config: The run's.
        shard: The part of the requests to ask.

    Raises:
        UserError: The settings, the key or the files are wrong, or the server refuses everything.
        SystemExit: With the exit code, where it is not 0.
    """
    if code := ask_all(config, shard):
        raise SystemExit(code)


def ask_all(
    config: InstructConfig,
    shard: Shard = ALL_REQUESTS,
    *,
    name: str = "generate",
    spending: Path | None = None,
) -> int:
    """Ask the requests in a run's folder that have no answer yet; return the exit code.

    Args:
        config: The run's.
        shard: The part of the requests to ask.
        name: The beginning of every line that is printed.
        spending: The file in which spending is counted; None for the run's own.

    Raises:
        UserError: The settings, the key or the files are wrong, or the server refuses everything.
    """
    if config.limits.usd is not None and config.teacher.prices is None:
        raise UserError(
            f"limits.usd needs {config.teacher.section}.prices, without which no cost is known; "
            "give the prices per million tokens"
        )
    return asyncio.run(_ask_all(config, shard, name, spending))


async def _ask_all(config: InstructConfig, shard: Shard, name: str, account: Path | None) -> int:
    folder = RunFolder(Path(config.output_dir))
    cancellation = Cancellation()
    spending = Spending(account or folder.spending, config.limits, cancellation)
    generation = Generation(config, folder, shard, spending, cancellation, name)
    teacher = make_teacher(config, folder, spending, cancellation)
    try:
        with generation.signals():
            async with shown(generation.progress):
                await generation.run(teacher)
    finally:
        await teacher.close()
        generation.close()
    return generation.report()


class Generation:
    """One start of the command: the pending requests, and where their answers are recorded."""

    def __init__(
        self,
        config: InstructConfig,
        folder: RunFolder,
        shard: Shard,
        spending: Spending,
        cancellation: Cancellation,
        name: str = "generate",
    ) -> None:
        self._config, self._folder, self._shard = config, folder, shard
        self._spending, self._cancellation = spending, cancellation
        place = answers_folder(config)
        self._answers = Answers(place)
        self._writer, self._claims = AnswerWriter(place), Claims(place)
        self._failures = _FailureLog(folder.failures)
        self._judge = _judge(config, folder)
        self._asking: set[str] = set()
        self._elsewhere = 0
        self._streak = 0
        self._most_streak = max(_STREAK, 2 * config.teacher.concurrency)
        self._error: BaseException | None = None
        self._signal: signal.Signals | None = None
        self._limited = False
        self._is_down = False
        self._dirty = False
        self.progress = GenerationProgress(spending, name)
        if self._writer.torn:
            self._say(
                f"{self._writer.path}: the last line was cut when a process was killed; its "
                f"{self._writer.torn:,} bytes were removed, and the request is asked again"
            )

    async def run(self, teacher: "Teacher | BatchTeacher") -> None:
        """Ask until every request is finished or the run is stopped.

        Raises:
            UserError: Every request would fail.
            OSError: An answer cannot be written.
        """
        self._count()
        syncing = asyncio.create_task(self._sync())
        try:
            await self._pass(teacher)
            while self._elsewhere and not self._cancellation.requested:
                with suppress(Cancelled):
                    await self._cancellation.sleep(_LOOK_SECONDS)
                self._elsewhere = 0
                await self._pass(teacher)
        finally:
            syncing.cancel()
        if self._error is not None:
            raise self._error

    def _count(self) -> None:
        self._answers.refresh()
        for request in read_requests(self._folder):
            if self._shard.holds(request.id):
                self.progress.total += 1
                self.progress.before += request.id in self._answers
        if self._answers.duplicates:
            self._say(
                f"{self._answers.folder}: {self._answers.duplicates:,} requests were answered more "
                "than once; the answer with the smaller SHA-256 is used"
            )

    async def _pass(self, teacher: "Teacher | BatchTeacher") -> None:
        queue = self._pending()
        if isinstance(teacher, Teacher):
            works = [self._work(queue, teacher) for _ in range(self._config.teacher.concurrency)]
        else:
            works = [self._guarded(teacher.fill(queue, self._record_new))]
        self._workers = [asyncio.create_task(work) for work in works]
        await asyncio.wait(self._workers)

    def _pending(self) -> Iterator[Request]:
        for request in read_requests(self._folder):
            if not self._shard.holds(request.id) or request.id in self._answers:
                continue
            if not self._failures.is_from_this_start(request.id):
                yield request

    async def _work(self, queue: Iterator[Request], teacher: Teacher) -> None:
        async def every() -> None:
            for request in queue:
                self._cancellation.check()
                await self._handle(request, teacher)
                await asyncio.sleep(0)  # rules never wait, and signals must still be handled

        await self._guarded(every())

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work`; an error of one worker stops the whole run in an orderly way."""
        try:
            await work
        except LimitReached:
            self._limited = True
            self._cancellation.request()
        except (Cancelled, asyncio.CancelledError):
            pass
        except BaseException as error:
            self._error = self._error or error
            self._cancellation.request()

    async def _handle(self, request: Request, teacher: Teacher) -> None:
        if request.id in self._asking or not self._claims.take(request.id):
            self._elsewhere += 1
            return
        self._asking.add(request.id)
        try:
            self._answers.refresh()
            if request.id in self._answers:  # another process was faster
                self.progress.before += 1
                return
            self._record(await teacher.ask(request), request)
        finally:
            self._asking.discard(request.id)
            self._claims.release(request.id)

    def _record_new(self, outcome: Answer | Failure) -> None:
        """Record an outcome of a batch unless an earlier start did."""
        self._answers.refresh()
        if outcome.request not in self._answers:
            self._record(outcome)

    def _record(self, outcome: Answer | Failure, request: Request | None = None) -> None:
        if isinstance(outcome, Answer):
            self._writer.write(outcome)
            self._dirty = True
            self._streak = 0
            self.progress.take(outcome, self._judge(request, outcome) if request else None)
            return
        self._failures.add(outcome)
        if outcome.reason == "nothing_to_say":
            self.progress.silent += 1
            return
        self.progress.failed += 1
        self._streak += 1
        if self._streak >= self._most_streak and not self._cancellation.requested:
            self._is_down = True
            self._say(
                f"{self._streak} requests in a row failed; stopping. Last error: {outcome.message}"
            )
            self._cancellation.request()

    async def _sync(self) -> None:
        while True:
            await asyncio.sleep(_SYNC_SECONDS)
            if self._dirty:
                self._dirty = False
                await asyncio.to_thread(self._writer.sync)

    def signals(self) -> "_Signals":
        """Handle Ctrl-C and SIGTERM within the block: the first stops orderly, a second at once."""
        return _Signals(self._on_signal)

    def _on_signal(self, number: signal.Signals) -> None:
        if self._signal is not None:
            self._cancel()
            return
        self._signal = number
        self._cancellation.request()
        self._say(
            f"{number.name} received: nothing more is sent; waiting up to {GRACE_SECONDS:.0f} s "
            "for requests in flight (repeat to stop at once)"
        )
        asyncio.get_running_loop().call_later(GRACE_SECONDS, self._cancel)

    def _cancel(self) -> None:
        for worker in self._workers:
            worker.cancel()

    def report(self) -> int:
        """Print the summary and return the exit code."""
        for line in [self.progress.summary(), *self._failures.lines()]:
            echo(line, file=sys.stdout)
        if self._signal is not None:
            self._print(f"stopped by {self._signal.name}; repeat the command to continue")
            return 128 + int(self._signal)
        if self._limited:
            self._print(
                "the next request might exceed one of limits; raise it and repeat the command"
            )
            return 4
        failed, asked = self.progress.failed, self.progress.total - self.progress.silent
        if not failed:
            return 0
        teacher = self._config.teacher
        setting = f"{teacher.section}.failures_allowed"
        share = f"{failed:,} of {asked:,} requests failed ({failed / max(1, asked):.1%})"
        if self._is_down:
            self._print(
                f"{share} and the others were not asked, since the server is down; run the same "
                "command again when it is up"
            )
            return 3
        if failed > teacher.failures_allowed * asked:
            self._print(
                f"{share}, more than {setting}={teacher.failures_allowed:g}; run the same command "
                f"again to ask them again, or raise {setting} to continue without them"
            )
            return 3
        self._print(
            f"warning: {share}, no more than {setting}={teacher.failures_allowed:g}: continuing "
            "without them; the same command asks them again"
        )
        return 0

    def _print(self, line: str) -> None:
        echo(f"{self.progress.name}: {line}", file=sys.stdout)

    def _say(self, line: str) -> None:
        echo(f"{self.progress.name}: {line}")

    def close(self) -> None:
        """Sync and close all files."""
        self._writer.close()
        self._claims.close()
        self._answers.close()
        self._failures.close()
        self._spending.close()


def _judge(config: InstructConfig, folder: RunFolder) -> Callable[[Request, Answer], bool | None]:
    """Return a function that verifies an answer, for the acceptance rate shown meanwhile."""
    if not folder.index.exists():
        return lambda request, answer: None
    from data_tools.instruct.grow.growth import read_growth
    from data_tools.instruct.index import read_categories, read_images
    from data_tools.instruct.verify import Policy
    from data_tools.instruct.verify.command import make_sample

    images = read_images(folder)
    policy = Policy(config.verify, read_categories(folder))
    growth = read_growth(folder, images)

    def accepted(request: Request, answer: Answer) -> bool | None:
        image = images.get(request.image)
        if image is None:
            return None
        return make_sample(request, answer, image, policy, growth).status == "accepted"

    return accepted


class _FailureLog:
    """The last failure of each request, appended to `failures.jsonl` if it is new."""

    def __init__(self, path: Path) -> None:
        self._log = SharedLog(path, b'{"request":"')
        self._written = {}
        for number, line in enumerate(self._log.news(), 1):
            try:
                self._written[Failure.model_validate_json(line).request] = line
            except ValidationError:
                echo(
                    f"generate: {path}:{number}: is not a failure record and is "
                    "ignored; it was damaged"
                )
        self._now: set[str] = set()
        self._reasons: Counter[str] = Counter()
        self._examples: dict[str, Failure] = {}

    def add(self, failure: Failure) -> None:
        self._now.add(failure.request)
        self._reasons[failure.reason] += 1
        self._examples.setdefault(failure.reason, failure)
        line = failure.model_dump_json()
        if self._written.get(failure.request) != line:
            with self._log.locked():
                self._log.append(line)

    def is_from_this_start(self, request: str) -> bool:
        return request in self._now

    def lines(self) -> list[str]:
        """Return one line per reason."""
        return [
            f"  {count:,} x {reason}: {self._examples[reason].message} (for one, "
            f"{self._examples[reason].sample_id})"
            for reason, count in self._reasons.most_common()
        ]

    def close(self) -> None:
        self._log.close()


class _Signals:
    """Passes SIGINT and SIGTERM to a function within the block; main thread only."""

    def __init__(self, handle: Callable[[signal.Signals], None]) -> None:
        self._handle = handle

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self._handle, number)

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().remove_signal_handler(number)
