"""Learning-rate schedules against their formulas and torch."""

import math

import pytest

from nbrnn.training.schedules import Constant, Cosine, OnPlateau, Step, WarmUp, from_config

ALL = [
    Constant(),
    Step(3, 0.5),
    Cosine(10, 0.01),
    WarmUp(4),
    WarmUp(4, Step(2, 0.1)),
    WarmUp(2, WarmUp(3, OnPlateau())),
    OnPlateau(0.5, 2, 0.01),
]


def rates(schedule, steps, base=0.8):
    return [schedule(step, base) for step in range(steps)]


def test_constant():
    assert rates(Constant(), 3) == [0.8] * 3


def test_step():
    assert rates(Step(3, 0.5), 7) == [0.8] * 3 + [0.4] * 3 + [0.2]


def test_cosine_ends_at_its_final_rate_and_stays():
    want = [0.1 + 0.7 * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(10)]
    assert rates(Cosine(10, 0.1), 13) == pytest.approx(want + [0.1] * 3, rel=1e-14)
    assert Cosine(10)(5, 0.8) == pytest.approx(0.4)


def test_warm_up_rises_to_the_base_and_hands_over():
    assert rates(WarmUp(4), 6) == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    after = rates(WarmUp(4, Step(3, 0.5)), 12)[4:]
    assert after == rates(Step(3, 0.5), 8)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Step(3, 0.5), lambda t, o: t.StepLR(o, 3, 0.5)),
        (Cosine(10, 0.05), lambda t, o: t.CosineAnnealingLR(o, 10, 0.05)),
        (WarmUp(4), lambda t, o: t.LinearLR(o, 1 / 4, 1.0, 3)),
    ],
)
def test_rates_agree_with_torch(ours, theirs):
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.8)
    schedule, want = theirs(torch.optim.lr_scheduler, optimizer), []
    for _ in range(10):
        want.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates(ours, 10) == pytest.approx(want, rel=1e-12)


LOSSES = [5, 4, 4, 4, 4, 3, 3.1, 3.2, 2.9999, 2.98, 3, 3, 3, 3, 3, 3, 1, 2, 0.5]


def test_plateaus_agree_with_torch():
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.8)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=2, threshold=1e-3)
    ours = OnPlateau(0.5, 2, 1e-3)
    for loss in LOSSES:
        theirs.step(loss)
        ours.observe(loss)
        assert ours(0, 0.8) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-14)


def test_a_plateau_reduces_after_its_patience():
    schedule, rate = OnPlateau(0.1, patience=1), []
    for loss in [3, 2, 2, 2, 2, 2, 1]:
        schedule.observe(loss)
        rate.append(schedule(0, 1.0))
    assert rate == pytest.approx([1, 1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("after", [0, 3, 4, 9])
def test_a_loaded_state_continues(after):
    for schedule in (OnPlateau(0.5, 2), WarmUp(3, OnPlateau(0.5, 2))):
        schedule = from_config(schedule.config())
        again = from_config(schedule.config())
        for loss in LOSSES[:after]:
            schedule.observe(loss)
        again.load_state_dict(schedule.state_dict())
        for loss in LOSSES[after:]:
            schedule.observe(loss)
            again.observe(loss)
            assert again(5, 0.8) == schedule(5, 0.8)


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_a_schedule_is_built_again_from_its_config(schedule):
    again = from_config(schedule.config())
    assert type(again) is type(schedule)
    assert again.config() == schedule.config()
    assert rates(again, 20) == rates(schedule, 20)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Step(0, 0.5),
        lambda: Step(2.0, 0.5),
        lambda: Step(2, -1),
        lambda: Cosine(0),
        lambda: Cosine(5, -0.1),
        lambda: WarmUp(0),
        lambda: WarmUp(3, 0.5),
        lambda: OnPlateau(1.0),
        lambda: OnPlateau(patience=-1),
        lambda: OnPlateau(threshold=1.0),
        lambda: from_config({"name": "Trainer"}),
        lambda: from_config({"name": "WarmUp", "steps": 3, "then": {"name": "eval"}}),
        lambda: Constant().load_state_dict({"best": 1}),
        lambda: OnPlateau().load_state_dict({"best": 1.0}),
        lambda: OnPlateau().load_state_dict({"best": "low", "waited": 0, "reductions": 0}),
        lambda: OnPlateau().load_state_dict({"best": 1.0, "waited": -1, "reductions": 0}),
    ],
)
def test_nonsense_is_refused(build):
    with pytest.raises((ValueError, TypeError), match=": expected"):
        build()
