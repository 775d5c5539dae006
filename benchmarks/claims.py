"""Is it true what papers, and we, say of a method? Runs a study and judges each claim: seeds, intervals, a verdict.

    python benchmarks/claims.py moextend --out runs/claims --write
    python benchmarks/claims.py moextend --out runs/claims --only layer_rule --seeds 0 1 2
    python benchmarks/claims.py moextend_scenes --out runs/claims_scenes

Data and base models are made once, the stages that a variant does not change once for each seed. A finished run is
not run again, so the same command continues where it stopped. Writes `ablation.json`, `ablation.md` and
`ablation.png` into the folder, and prints the tables; exit code 1 if no run of the default came to its end. `--write`
puts the tables into docs/claims.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pages
from ablation import report
from ablation.planning import DEFAULT, make_plan, write_layers
from ablation.report import Rows
from ablation.running import Clock, run_all
from ablation.studies import STUDIES, Study, Variant

from moextend_pl.contracts import UserError
from moextend_pl.runs.atomic import write_json, write_text


def chosen_variants(study: Study, only: list[str]) -> list[Variant]:
    """Returns the variants of the named factors, or those named as `factor-level`; all if none is named.

    Raises:
        UserError: If a name is unknown.
    """
    known = {name.replace(" ", "_") for v in study.variants for name in (v.factor, v.name)}
    wanted = [name.replace(" ", "_") for name in only]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise UserError(f"Expected `--only` among {', '.join(sorted(known))}; got {unknown[0]!r}.")
    return [v for v in study.variants if not wanted or {v.factor.replace(" ", "_"), v.name} & set(wanted)]


def run_study(study: Study, out: Path, variants: list[Variant], seeds: list[int], jobs: int, quick: bool) -> Rows:
    """Runs a study, writes its reports, and returns its rows."""
    begin = time.monotonic()
    print(report.promise(study, len(seeds)))
    plan = make_plan(study, out, variants, seeds, quick)
    write_layers(study, out)
    outcomes = run_all(plan, out, out / "configs" / study.configs, jobs, Clock(study.seconds, jobs))
    rows = report.collect(plan, outcomes)
    write_json(
        out / "ablation.json",
        {
            "seeds": seeds,
            "quick": quick,
            "levels": report.summary(study, rows),
            "findings": [asdict(finding) for finding in report.findings(study, rows)],
            "runs": {name: {k: v for k, v in o.items() if k != "digest"} for name, o in sorted(outcomes.items())},
        },
    )
    write_text(out / "ablation.md", report.markdown(study, rows))
    report.plot(study, rows, out / "ablation.png")
    print((out / "ablation.md").read_text(encoding="utf-8"))
    print(f"{(time.monotonic() - begin) / 60:.1f} min; the report is in {out / 'ablation.md'}")
    return rows


def write_page(page: Path, name: str, study: Study, rows: Rows, seeds: int) -> None:
    """Puts the tables of a study into the page of claims, at the study's mark."""
    tables = (report.claims_table(report.findings(study, rows)), report.levels_table(study, rows))
    pages.put(page, f"claims.py {name}", "\n\n".join(filter(None, (report.promise(study, seeds), *tables))))


def main(argv: list[str]) -> int:
    """Runs the command line; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs and of the report")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--only", nargs="+", default=[], help="factors, or variants as factor-level")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, each on one core (default 2)")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it works")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/claims.md")
    options = parser.parse_args(argv)
    if options.write and (options.quick or options.only):
        parser.error("--write needs a whole study: leave --quick and --only out")
    study = STUDIES[options.study]
    try:
        variants = chosen_variants(study, options.only)
        if options.jobs < 1:
            raise UserError(f"Expected `--jobs` of at least 1, got {options.jobs}.")
        rows = run_study(study, options.out, variants, options.seeds, options.jobs, options.quick)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.write:
        write_page(pages.DOCS / "claims.md", options.study, study, rows, len(options.seeds))
    return 0 if rows[DEFAULT.factor, DEFAULT.level].values["vqa"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
