"""What the doctor has found: one line a finding, with the remedy in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")

OK, WARNING, PROBLEM, FINISHED = "ok", "warning", "problem", "finished"
_SHOWN = 6  # findings of one kind


@dataclass(frozen=True)
class Finding:
    """level: ok, warning (a run goes on, but something should be known), problem (a run stops there) or finished (nothing is
    left to run)."""

    level: str
    topic: str
    text: str

    def __str__(self) -> str:
        first, *rest = self.text.splitlines()
        return "\n".join([f"{self.level:<9}{self.topic:<10}{first}", *(f"{'':<19}{line}" for line in rest)])


@dataclass
class Findings:
    """Findings in the order in which they were made."""

    found: list[Finding] = field(default_factory=list)

    def ok(self, topic: str, text: str) -> None:
        """Note that something is as it should be."""
        self.found.append(Finding(OK, topic, text))

    def warning(self, topic: str, text: str) -> None:
        """Note what does not stop a run but should be known."""
        self.found.append(Finding(WARNING, topic, text))

    def problem(self, topic: str, text: str) -> None:
        """Note what would stop a run."""
        self.found.append(Finding(PROBLEM, topic, text))

    def finished(self, topic: str, text: str) -> None:
        """Note that what is asked for has been done."""
        self.found.append(Finding(FINISHED, topic, text))

    def problems(self, topic: str, texts: Sequence[str]) -> None:
        """Note several problems of one kind: the first few, and how many more."""
        for text in texts[:_SHOWN]:
            self.problem(topic, text)
        if len(texts) > _SHOWN:
            self.problem(topic, f"... and {len(texts) - _SHOWN} more of the kind.")

    def attempt(self, topic: str, check: Callable[[], T]) -> T | None:
        """Return what `check` does; None when it raises a user's error, which becomes a problem."""
        try:
            return check()
        except (ValueError, OSError) as error:
            self.problem(topic, str(error))
            return None

    def count(self, level: str) -> int:
        """Count the findings of a level."""
        return sum(finding.level == level for finding in self.found)
