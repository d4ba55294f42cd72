"""Addresses of data sets on a hub: `hf://datasets/OWNER/NAME@REVISION?config=CONFIG&split=SPLIT`."""

import re
from dataclasses import dataclass, replace
from typing import Final
from urllib.parse import parse_qsl

PREFIX: Final = "hf://"
_DATASETS: Final = "hf://datasets/"
_NAME: Final = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_VALUE: Final = re.compile(r"[\w./-]+", re.ASCII)
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_FORM: Final = "hf://datasets/OWNER/NAME@REVISION?config=CONFIG&split=SPLIT (the name suffices)"


@dataclass(frozen=True)
class HubAddress:
    """A split of a data set on the hub.

    Attributes:
        name: `OWNER/NAME`.
        revision: A branch, tag or commit; None: the main branch.
        config: The configuration ("subset") of the data set; None: its only or default one.
        split: None: its only split.
        commit: The commit that the revision was when a run began.
    """

    name: str
    revision: str | None = None
    config: str | None = None
    split: str | None = None
    commit: str | None = None

    @classmethod
    def parse(cls, text: str) -> "HubAddress":
        """Read an address.

        Raises:
            ValueError: It is none; the message says what is wrong with it.
        """
        if not text.startswith(_DATASETS):
            raise ValueError(f"{text!r}: only data sets are read from the hub; expected {_FORM}")
        place, _, query = text.removeprefix(_DATASETS).partition("?")
        name, at, revision = place.partition("@")
        if not _NAME.fullmatch(name):
            raise ValueError(f"{text!r}: {name!r} is not OWNER/NAME; expected {_FORM}")
        if at and not _VALUE.fullmatch(revision):
            raise ValueError(f"{text!r}: {revision!r} is not a revision; expected {_FORM}")
        options: dict[str, str] = {}
        for key, value in parse_qsl(query, keep_blank_values=True):
            if key not in ("config", "split", "commit") or key in options:
                problem = "appears twice" if key in options else "is not an option of an address"
                raise ValueError(f"{text!r}: {key!r} {problem}; expected {_FORM}")
            if not (_COMMIT if key == "commit" else _VALUE).fullmatch(value):
                raise ValueError(f"{text!r}: {value!r} is not a {key}; expected {_FORM}")
            options[key] = value
        if query and not options:
            raise ValueError(f"{text!r}: {query!r} has no option; expected {_FORM}")
        return cls(name, revision or None, **options)

    def __str__(self) -> str:
        parts = {"config": self.config, "split": self.split, "commit": self.commit}
        query = "&".join(f"{key}={value}" for key, value in parts.items() if value is not None)
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{_DATASETS}{self.name}{revision}{'?' if query else ''}{query}"

    @property
    def known_commit(self) -> str | None:
        """The commit, if the address says it."""
        is_commit = self.revision is not None and _COMMIT.fullmatch(self.revision)
        return self.revision if is_commit else self.commit

    def without_commit(self) -> "HubAddress":
        """Return the address as it was before a run began."""
        return replace(self, commit=None)


def is_hub_address(path: str) -> bool:
    """Return whether the path of a data file means something on the hub."""
    return path.startswith(PREFIX)
