"""How many of diffusers' own tests of its schedulers and pipelines pass with our classes in their place?

    python benchmarks/peer_tests.py DIFFUSERS       # a checkout of diffusers; writes results/peer_tests.{json,md}

Its tests run twice under the installed diffusers: with its classes, and with ours. Tests that fail or are skipped with
its own do not count. Those that ours must fail are in `REASONS`. They need pytest, parameterized and requests-mock.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import diffusers
from diffusers.configuration_utils import FrozenDict

from diffusers_dpm import DDIMScheduler, DDPMScheduler, DPMPipeline, DPMSolverScheduler


TESTS = {
    **{f"schedulers/test_scheduler_{name}.py": name for name in ("ddpm", "ddim", "dpm_multi", "dpm_single")},
    **{f"pipelines/{name}/test_{name}.py": f"{name} pipeline" for name in ("ddpm", "ddim")},
}
SMALLEST = next(iter(TESTS))
# test -> why ours must fail it; each is a line of docs/differences.md
NO_GUIDE = "with theirs it checks nothing: DDIMPipeline takes no guidance_scale; ours refuses one where nothing guides"
OWN_KEYS = "our own config keys are not written at their default, so that diffusers' classes read the file in silence"
LABELS = "their labels of generated sigmas are not those of the levels used; ours are"
DDPM, DDIM, SINGLE, MULTI = (
    f"{name}SchedulerTest::test_" for name in ("DDPM", "DDIM", "DPMSolverSinglestep", "DPMSolverMultistep")
)
REASONS = {
    **{f"DDIMPipelineFastTests::test_{name}": NO_GUIDE for name in ("callback_cfg", "cfg")},
    **{f"{kind}from_pretrained": OWN_KEYS for kind in (DDPM, DDIM, MULTI, SINGLE)},
    "DDPMSchedulerTest::test_full_loop_with_noise": "their tables are float32; with float64 ones they give our sum",
    MULTI + "full_loop_with_karras_and_v_prediction": LABELS,
    MULTI + "full_loop_with_lu_and_v_prediction": LABELS,
    MULTI + "rescale_betas_zero_snr": "epsilon says nothing of x_0 where alpha is 0; theirs divides by 2^-12 instead",
    SINGLE + "full_loop_with_karras": LABELS,
    SINGLE + "full_loop_with_karras_and_v_prediction": LABELS,
    SINGLE + "solver_order_and_type": "the noises of an SDE's stages would be of different Brownian paths",
}


class SinglestepScheduler(DPMSolverScheduler):
    """Ours, with the method that diffusers' class has in its name."""

    @functools.wraps(DPMSolverScheduler.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"method": "singlestep", **kwargs})
        unwritten = [*self.config.get("_use_default_values", ()), *{"method"} - kwargs.keys()]
        self._internal_dict = FrozenDict({**self.config, "_use_default_values": unwritten})


OURS = {
    "DDPMScheduler": DDPMScheduler,
    "DDIMScheduler": DDIMScheduler,
    "DPMSolverMultistepScheduler": DPMSolverScheduler,
    "DPMSolverSinglestepScheduler": SinglestepScheduler,
    "DDPMPipeline": DPMPipeline,
    "DDIMPipeline": DPMPipeline,
}


class Peers:
    """A plugin of pytest that puts classes into diffusers while its tests are imported.

    Args:
        classes: name in diffusers -> class.
        output: JSON file, test -> the first line of its error, or null if it passed.
    """

    def __init__(self, classes, output):
        self.theirs = {name: getattr(diffusers, name) for name in classes}
        self.ours, self.output, self.results = classes, output, {}

    def pytest_collection(self):
        self.put(self.ours)

    def pytest_collection_finish(self):
        self.put(self.theirs)  # what diffusers itself looks up by these names are its own

    def put(self, classes):
        for name, value in classes.items():
            setattr(diffusers, name, value)

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.removeprefix("tests/")
        if "::SchedulerCommonTest::" in name:  # imported by each file; it has no classes to test
            return
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.results[name] = (crash.message if crash else str(report.longrepr)).splitlines()[0]
        elif report.passed and report.when == "call":
            self.results[name] = None

    def pytest_sessionfinish(self):
        self.output.write_text(json.dumps(self.results))


def run_tests(checkout, side, files):
    """{test: None, or the first line of its error}; skipped tests are not in it."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "results.json"
        command = [sys.executable, __file__, "--run", side, str(output), *(f"tests/{file}" for file in files)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        if done.returncode > 1:  # 1: tests failed
            raise SystemExit(f"pytest failed in {checkout}: {(done.stdout + done.stderr)[-2000:]}")
        return json.loads(output.read_text())


def compare(theirs, ours):
    """{kind of tests: [passed, of]} and a row for each that fails, among the tests that pass with their classes."""
    counts, failed = {}, []
    for test in (test for test, error in theirs.items() if error is None):
        file, name = test.split("::", 1)
        error = ours.get(test, "not run")
        count = counts.setdefault(TESTS[file], [0, 0])
        count[0] += error is None
        count[1] += 1
        if error is not None:
            failed.append({"test": name, "error": error, "reason": REASONS.get(name)})
    return counts, failed


def markdown(counts, failed):
    numbers = {**counts, "all": [sum(column) for column in zip(*counts.values(), strict=True)]}
    lines = [[f"`{row['test']}`", row["error"].replace("|", "\\|")[:160], row["reason"] or ""] for row in failed]
    tables = [
        table(["tests", "passed", "of"], [[name, *map(str, number)] for name, number in numbers.items()]),
        table(["test", "error", "why it must fail"], lines),
    ]
    return "\n\n".join(tables) + "\n"


def main():
    parser = make_parser(__doc__, "peer_tests.json")
    parser.add_argument("checkout", type=Path, metavar="DIFFUSERS", help="checkout of diffusers, with its tests")
    arguments = parse(parser)
    files = [SMALLEST] if arguments.smallest else [*TESTS]
    theirs, ours = (run_tests(arguments.checkout, side, files) for side in ("theirs", "ours"))
    counts, failed = compare(theirs, ours)
    save(arguments.output, {"versions": versions(), "passed": counts, "failed": failed})
    show(arguments, markdown(counts, failed))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        import pytest

        side, output, *files = sys.argv[2:]
        options = ["-q", "-p", "no:cacheprovider", "--no-header"]
        sys.exit(pytest.main([*options, *files], plugins=[Peers(OURS if side == "ours" else {}, Path(output))]))
    from common import make_parser, parse, save, show, table, versions

    main()
