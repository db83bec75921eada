"""Fits the constants of the model of time: `python -m jaxserve.planner.fit [FILE]`.

Least squares of the logarithms of estimated by measured time over `published.ROWS`, within the
bounds of `efficiency.BOUNDS`. A weak pull to the middle of the bounds decides what the rows do not:
few rows and four constants leave directions open when a phase is left out. Each row's error is
printed, and that which it has when it, or all rows of its phase, are left out of the fit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from jaxserve.partitioning.efficiency import BOUNDS, Efficiency
from jaxserve.planner.published import ROWS, Row

PULL = 0.03
"""Weight of the pull: a constant at a bound costs as much as a row that is 1.5% off."""


def fit(rows: Sequence[Row]) -> Efficiency:
    """Returns the constants that meet the rows best."""
    low, high = (np.array([bound[end] for bound in BOUNDS.values()]) for end in (0, 1))

    def residuals(share: np.ndarray) -> np.ndarray:
        tried = _constants(low + share * (high - low))
        errors = [np.log1p(row.error(tried)) for row in rows]
        return np.array([*errors, *(PULL * (share - 0.5))])

    found = least_squares(residuals, np.full(len(BOUNDS), 0.5), bounds=(0.0, 1.0))
    return _constants(low + found.x * (high - low))


def report(say: Callable[[str], object]) -> dict[str, object]:
    """Returns the contents of `efficiency.toml`, and says how good they are."""
    every = fit(ROWS)
    columns = ("all", "without the row", "without its phase")
    say(f"{'row':<26}{'measured ms':>12}" + "".join(f"{name:>19}" for name in columns))
    worst: dict[str, float] = {}
    errors = []
    for row in ROWS:
        alone = fit([other for other in ROWS if other != row])
        phase = fit([other for other in ROWS if other.phase != row.phase])
        three = [row.error(constants) for constants in (every, alone, phase)]
        say(f"{row.name:<26}{row.measured_s * 1e3:>12.1f}" + "".join(f"{e:>+19.1%}" for e in three))
        chip = row.on.partition(":")[0]
        worst[chip] = max(worst.get(chip, 0.0), abs(three[1]))
        errors.append({"row": row.name, **dict(zip(columns, three, strict=True))})
    band = {chip: _up(value) for chip, value in worst.items()}
    return {
        **{name: getattr(every, name) for name in BOUNDS},
        "band": {**band, "other": 2 * max(band.values())},
        "errors": errors,
    }


def write(contents: dict[str, object], path: Path) -> None:
    """Writes the constants as TOML."""
    lines = ["# Written by `python -m jaxserve.planner.fit`; see docs/plan.md."]
    lines += [f"{name} = {_plain(contents[name]):.4g}" for name in BOUNDS]
    lines += ["", "[band]"]
    band = contents["band"]
    assert isinstance(band, dict)
    lines += [f"{chip} = {value:.2f}" for chip, value in band.items()]
    errors = contents["errors"]
    assert isinstance(errors, list)
    for row in errors:
        lines += ["", "[[errors]]", f'row = "{row["row"]}"']
        lines += [f'"{name}" = {value:.4f}' for name, value in row.items() if name != "row"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _constants(values: np.ndarray) -> Efficiency:
    return Efficiency(*(float(value) for value in values))


def _plain(value: object) -> float:
    """Returns a constant, one that came within rounding of zero as zero."""
    assert isinstance(value, float)
    return 0.0 if value < 1e-9 else value


def _up(value: float) -> float:
    """Returns a share rounded up to five hundredths."""
    return float(np.ceil(value * 20) / 20)


def main() -> None:
    """Fits, prints the errors and writes the file that is named, or the package's."""
    import jaxserve.partitioning.efficiency as home

    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(home.__file__).parent
    contents = report(lambda line: sys.stdout.write(line + "\n"))
    for name in BOUNDS:
        sys.stdout.write(f"{name:<10}{_plain(contents[name]):.4g}\n")
    write(contents, target / "efficiency.toml" if target.is_dir() else target)


if __name__ == "__main__":
    main()
