"""Which graphics cards MegEngine can train on, as NVIDIA's driver lists them."""

from __future__ import annotations

import pytest

from mgq.bench import doctor
from mgq.engine.training import training_run
from mgq.engine.training.train_options import TrainOptions
from mgq.errors import InputError
from mgq.system.graphics_cards import GraphicsCard, parse_cards, refuse_unfit

NEW = GraphicsCard("NVIDIA H200", (9, 0))
KNOWN = GraphicsCard("Tesla T4", (7, 5))


def test_the_drivers_listing_names_cards_and_capabilities() -> None:
    assert parse_cards("NVIDIA H200, 9.0\nTesla T4, 7.5\nOdd, one, [N/A]\n\n") == (NEW, KNOWN)


@pytest.mark.parametrize("capability, fits", [((5, 0), False), ((5, 2), True), ((7, 5), True), ((8, 0), False)])
def test_cards_between_maxwell_and_turing_fit(capability: tuple[int, int], fits: bool) -> None:
    assert GraphicsCard("card", capability).fits is fits


def test_a_card_that_is_too_new_is_one_line_with_the_mend() -> None:
    refuse_unfit([KNOWN])
    with pytest.raises(InputError, match=r"NVIDIA H200 .*9\.0.*5\.2 to 7\.5.*-n 0"):
        refuse_unfit([KNOWN, NEW])


def test_training_refuses_a_card_that_is_too_new_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_run, "gpus", lambda: 1)
    monkeypatch.setattr(training_run, "graphics_cards", lambda: (NEW,))
    monkeypatch.setattr("megengine.set_default_device", lambda device: None)
    with pytest.raises(InputError, match="does not train"):
        training_run.find_cluster(TrainOptions(devices=None))
    assert training_run.find_cluster(TrainOptions(devices=0)).world == 1


def test_doctor_names_a_card_that_is_too_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "graphics_cards", lambda: (NEW,))
    with pytest.raises(doctor.LackingError, match="NVIDIA H200"):
        doctor.cards()
    monkeypatch.setattr(doctor, "graphics_cards", lambda: (KNOWN,))
    assert "Tesla T4" in doctor.cards()
