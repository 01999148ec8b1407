"""Measures times in turns, because the machine slows down and speeds up."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeAlias

from mgq.bench.statistics import Rounds

Turn: TypeAlias = Callable[[int], tuple[int, ...]]
"""Number of single runs -> the time of each in nanoseconds; none where it cannot run."""


def take_turns(
    turns: Sequence[Turn],
    rounds: int,
    seed: int,
    on_turn: Callable[[int, int], None],
    turn_ns: int,
    warm_up: int,
    most: int,
) -> list[Rounds]:
    """The times of all ``turns``, one tuple a round.

    In every round each has one turn, in an order that is shuffled anew, so that what disturbs one disturbs all alike.
    From ``warm_up`` runs that are not counted follows how many runs fill a turn of about ``turn_ns``, ``most`` at most;
    the number is the same in all rounds. ``on_turn`` is called with the number of turns done and their total.
    """
    order = random.Random(seed)
    repeats = [0] * len(turns)
    for index in shuffle_order(len(turns), order):
        fastest = min(turns[index](warm_up) or (1,))
        repeats[index] = min(max(turn_ns // max(fastest, 1), 1), most)
    times: list[list[tuple[int, ...]]] = [[] for _ in turns]
    total = rounds * len(turns)
    for number in range(rounds):
        for place, index in enumerate(shuffle_order(len(turns), order)):
            on_turn(number * len(turns) + place, total)
            times[index].append(turns[index](repeats[index]))
    on_turn(total, total)
    return [tuple(found) for found in times]


def shuffle_order(number: int, order: random.Random) -> list[int]:
    return order.sample(range(number), number)
