"""Which of the passing engines becomes the release: a fixed rule, which also gives an answer on a noisy machine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from slipstream.contract.evidence import Race, Row, Standing
from slipstream.measure import race as races
from slipstream.plan import flow


@dataclass(frozen=True)
class Choice:
    """Choice of the best engine: by the race if the objective prefers speed, otherwise with the race to break ties."""

    prefer: str
    confidence: float
    rows: Mapping[str, Row]
    race: Race | None
    absent: Mapping[str, str] = field(default_factory=dict)
    """Reasons, by cell, for those that took no part in the race."""

    @property
    def entrants(self) -> list[str]:
        """Cells that passed and may be released."""
        return [cell for cell, row in self.rows.items() if row.status == "passed" and not row.comparison]

    def entrants_of(self, target: str) -> list[str]:
        """Return a target's cells that passed, even if its engines are for comparison only."""
        passed = [c for c, r in self.rows.items() if r.status == "passed"]
        return [c for c in passed if flow.cell_of(c).target == target]

    def best(self, cells: Sequence[str]) -> str | None:
        """Return the cell that the objective prefers; None of none. Of those that may be as fast as the fastest, take
        the smallest, then the first by name; so there is a pick even if noise leaves all of them tied."""
        raced = [c for c in cells if self.race is not None and c in self.race.rounds_ms]
        return min(raced or cells, key=self._rank(raced), default=None)

    def _rank(self, raced: Sequence[str]) -> Callable[[str], tuple[float | str, ...]]:
        places = races.standings(self.race, raced, self.confidence) if self.race is not None and raced else {}

        def speed(cell: str) -> tuple[float, ...]:
            if cell in places:
                return (places[cell].ms,)
            evidence = self.rows[cell].evidence  # without a race: faster than FP32 on the same target, each separately
            ratio = evidence.speedup_reference if evidence else None
            return (0.0 if ratio is None else -ratio.estimate,)

        def rank(cell: str) -> tuple[float | str, ...]:
            evidence = self.rows[cell].evidence
            assert evidence is not None, "a row that passed has evidence"
            size = evidence.size_bytes
            if self.prefer == "size":
                return (size, *speed(cell), cell)
            if self.prefer == "accuracy":
                return (-evidence.engine_quality, *speed(cell), cell)
            if cell in places:
                return (False, size, cell) if races.tied(places[cell]) else (True, *speed(cell), cell)
            return (*speed(cell), size, cell)

        return rank

    def placed(self, row: Row) -> Row:
        """Return the row with its rank in the race."""
        entrants = [c for c in self.entrants if self.race is not None and c in self.race.rounds_ms]
        if self.race is None or not entrants:
            return row
        standings: Mapping[str, Standing] = races.standings(self.race, entrants, self.confidence)
        return row.model_copy(update={"standing": standings.get(row.cell)})

    def reason(self, winner: str) -> str:
        """Return why this engine was picked, in a sentence."""
        sentence = f"{winner} is the best of {len(self.entrants)} passing engines by {self.prefer}"
        if self.race is None or winner not in self.race.rounds_ms:
            return sentence
        raced = [c for c in self.entrants if c in self.race.rounds_ms]
        places = races.standings(self.race, raced, self.confidence)
        sentence += f": {places[winner].ms:.3g} ms a request in one run with all of them"
        equal = [c for c in raced if c != winner and races.tied(places[c])]
        if self.prefer in ("latency", "throughput") and equal:
            sentence += f"; {', '.join(equal)} may be as fast, and {'is' if len(equal) == 1 else 'are'} not smaller"
        return sentence
