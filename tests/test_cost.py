"""What a command says about its cost before it starts."""

import re
from types import SimpleNamespace

import pytest

from diffusers_dpm.networks import duration, guided_calls, measured_seconds, report_cost
from tests.models import tiny_classifier, tiny_unet


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.123, "0.12 seconds"), (90, "90 seconds"), (600, "10 minutes"), (7201, "2 hours"), (177 * 3600, "7 days")],
)
def test_durations_in_words(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "calls"), [(1, [1, 1]), (2, [2, 2]), (64, [2, 2, 64])])
def test_what_is_measured(count, calls):
    done = []
    assert measured_seconds(done.append, count) >= 0
    assert done == calls


def test_what_is_slow_is_measured_on_a_part(monkeypatch):
    clock, done = [0.0], []
    monkeypatch.setattr("diffusers_dpm.networks.time.perf_counter", lambda: clock[0])

    def work(images):
        done.append(images)
        clock[0] += 3.0 * images

    assert measured_seconds(work, 64) == 3.0 * 64
    assert done == [2]


@pytest.mark.parametrize("config", [{}, {"num_class_embeds": 3}])
@pytest.mark.parametrize(("guided", "derivatives"), [(False, 0), (True, 0), (False, 2), (True, 1)])
def test_a_line_before_the_work(config, guided, derivatives, capsys):
    unet, classifier = tiny_unet(**config), tiny_classifier() if guided else None
    report_cost(unet, 64_000, 4, classifier=classifier, derivatives=derivatives)
    line = capsys.readouterr().err
    assert re.fullmatch(r"64,000 network calls for one image each: about [\d.e+-]+ \w+ here\n", line)
    assert all(weight.grad is None for weight in unet.parameters())


def test_nothing_to_do_costs_nothing(capsys):
    report_cost(tiny_unet(), 0, 4)
    report_cost(tiny_unet(), 9, 4, SimpleNamespace(process_index=1, num_processes=2))
    assert capsys.readouterr().err == ""


def test_a_network_that_guides_itself_is_called_twice():
    assert [guided_calls(7, *guide) for guide in ((None, None), (2.0, "classifier"), (2.0, None))] == [7, 7, 14]
