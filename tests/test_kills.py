"""Accidents at any file operation: a kill, a full disk, a folder that cannot be written, two commands at once."""

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from tests.test_fuzz import outcome, uses
from tests.whole_run import THOROUGH, call, commands


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_process")]
CHUNKS, ACCIDENTS = 11 if THOROUGH else 6, 10  # test cases, and kills in each
FAULTS = 4 if THOROUGH else 2  # of each kind in each use
WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
USES = (
    "own",
    "pictures",
    "fresh",
    "statistics",
    "calibrate",
    "bound",
    "evaluate",
    "train",
    "train-classifier",
    "train-features",
)


class Killed(BaseException):
    """Nothing catches it, and what cleans up on the way fails too: as far as the disk goes, SIGKILL."""


class Accident:
    """Below `root`, from file operation number `at` on, every write raises `error`; `at=None` only counts."""

    def __init__(self):
        self.root, self.at, self.error, self.count = None, None, None, 0
        sys.addaudithook(self.hook)

    def hook(self, event, arguments):
        if self.root is None or not (event in WRITES or event == "open"):
            return
        path = str(arguments[0])
        writes = event in WRITES or (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if not writes or not path.startswith(self.root) or path.endswith(".lock"):
            return
        self.count += 1
        if self.at is not None and self.count >= self.at:
            raise self.error

    @contextmanager
    def happens(self, root, at=None, error=None):
        self.root, self.at, self.error, self.count = str(root), at, error, 0
        try:
            yield self
        finally:
            self.root = None


ACCIDENT = Accident()


def all_uses(root):
    picture = ["sample", root / "run", "--seeds", "0-3", "--num-inference-steps", 2, "--cpu", "--batch-size", 2]
    fresh = ["train", *commands(root)["train"][1:], "--output-dir", root / "fresh"]
    return {
        **uses(root),
        "pictures": ([*picture, "--output", root / "drawn"], ["drawn/000003.png"], ""),
        "fresh": (fresh, ["fresh/unet/diffusion_pytorch_model.safetensors"], ""),
    }


@pytest.fixture(scope="module")
def whole(whole_run):
    """A whole run, what each use of it gives, and the number of its file operations."""
    known = {}
    for name in USES:
        root = copy(whole_run)
        arguments, results, _ = all_uses(root)[name]
        with ACCIDENT.happens(root) as counted:
            assert call(*arguments)[0] == 0
        known[name] = [outcome(root, path) for path in results], counted.count
    return whole_run, known


def copy(base):
    root = base.with_name("copy")
    shutil.rmtree(root, ignore_errors=True)
    return shutil.copytree(base, root)


def loses(base, known, name, seed):
    """None, or a line: after a kill, the next start must go on to the same result."""
    root, (expected, operations) = copy(base), known[name]
    arguments, results, _ = all_uses(root)[name]
    at = random.Random(seed).randrange(operations) + 1
    with ACCIDENT.happens(root, at, Killed()):
        call(*arguments)
    line = goes_on(arguments)
    same = not line and [outcome(root, path) for path in results] == expected
    return None if same else f"#{seed} {name}, operation {at} of {operations}: {line or 'another result'}"


def goes_on(arguments):
    """Start a command again, as its message says; returns the line of an error, or "" where all is done."""
    code, line = call(*arguments)
    if code and "--resume continues" in line:
        code, line = call(*arguments, "--resume")
    return "" if code == 0 or "exists already" in line else line  # else it came when all was done


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_kills_lose_nothing_and_block_nothing(whole, chunk):
    seeds = range(ACCIDENTS * chunk, ACCIDENTS * (chunk + 1))
    assert not [*filter(None, (loses(*whole, USES[seed % len(USES)], seed) for seed in seeds))]


def says_too_much(base, known, name, seed, kind):
    """None, or a line: a disk that takes no more gives one line, and afterwards the command goes on."""
    root, (expected, operations) = copy(base), known[name]
    arguments, results, _ = all_uses(root)[name]
    at = random.Random(seed).randrange(operations) + 1
    with ACCIDENT.happens(root, at, OSError(kind, os.strerror(kind), str(root))):
        code, line = call(*arguments)
    about = f"#{seed} {name}, operation {at} of {operations}"
    if code not in (0, 2) or (code == 2 and not line.startswith("error: ")):
        return f"{about}: {code}: {line}"
    line = goes_on(arguments)
    same = not line and [outcome(root, path) for path in results] == expected
    return None if same else f"{about}: afterwards {line or 'another result'}"


@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EROFS, errno.ENOENT])
@pytest.mark.parametrize("name", USES)
def test_a_disk_that_takes_no_more_is_one_line(whole, name, kind):
    assert not [*filter(None, (says_too_much(*whole, name, seed, kind) for seed in range(FAULTS)))]


@pytest.mark.parametrize("name", ["train", "train-classifier", "statistics", "calibrate", "own"])
def test_two_at_once(whole, name):
    """Of two processes with the same work one does it, and the other says one line or finds it done."""
    root = copy(whole[0])
    arguments, results, _ = all_uses(root)[name]
    command = [sys.executable, "-m", "diffusers_dpm.commands.main", *map(str, arguments)]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [(process.communicate()[1].strip().split("\n")[-1], process.returncode) for process in both]
    assert 0 in [code for _, code in ends]
    assert all(code == 0 or ("error: " in line and code == 2) for line, code in ends), ends
    assert [outcome(root, path) for path in results] == whole[1][name][0]
    assert commands(root)


def terminated(arguments):
    """The lines on stderr, but for bars, of a process that gets SIGTERM when its bar has moved; and its exit code."""
    command = [sys.executable, "-m", "diffusers_dpm.commands.main", *map(str, arguments)]
    process, text = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE), b""
    while not re.search(rb"\| [1-9]\d+/\d+ \[.*(call|step)", text):
        text += (part := os.read(process.stderr.fileno(), 4096))
        assert part, text
    process.terminate()
    lines = (text + process.communicate()[1]).decode().replace("\r", "\n").split("\n")
    return [line for line in lines if line and not re.search(r"\d+/\d+ \[", line)], process.returncode


LONGER = {
    "statistics": (["--num-samples", 24, "--timesteps", 20, "--batch-size", 1], "new/partial"),
    "calibrate": (["--num-images", 24, "--batch-size", 1], "run/calibrated/partial"),
    "bound": (["--num-images", 24, "--num-inference-steps", 20, "--batch-size", 1], "run/likelihood_elbo.safetensors"),
    "own": (["--seeds", "0-99", "--batch-size", 1], "drawn.npz.partial/000000.npy"),
}


@pytest.mark.parametrize("name", [*LONGER])
def test_a_terminated_process_keeps_what_is_done(whole, name):
    root, (options, kept) = copy(whole[0]), LONGER[name]
    use, results, _ = all_uses(root)[name]
    (cost, line), code = terminated([*use, *options])
    assert "network calls" in cost
    assert line == "error: interrupted; the same command resumes"
    assert code in (130, -signal.SIGINT)  # the second is of Python, within an import; a shell has 130 for both
    assert (root / kept).exists()
    assert call(*use, *options)[0] == 0
    results = [outcome(root, path) for path in results]
    root = copy(whole[0])
    use, files, _ = all_uses(root)[name]
    assert call(*use, *options)[0] == 0
    assert [outcome(root, path) for path in files] == results
