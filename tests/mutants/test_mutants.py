"""The state machines are worth something: each seeded bug makes one of them fail."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from helpers.machines import KVMachine, SchedulerMachine, quick
from hypothesis.stateful import run_state_machine_as_test

sys.path.insert(0, str(Path(__file__).parent))

from mutants import MUTANTS, Mutant

MAX_EXAMPLES = 600
SMOKE = {"double_free", "missing_salt", "leak_on_abort", "one_token_over_the_budget"}


def catch(mutant: Mutant, max_examples: int) -> None:
    with mutant.on(), pytest.raises(BaseException) as caught:
        run_state_machine_as_test(mutant.machine, settings=quick(max_examples, 40, shrink=False))
    assert not isinstance(caught.value, KeyboardInterrupt)


@pytest.mark.parametrize("name", sorted(SMOKE))
def test_bug_is_found_at_once(name: str) -> None:
    catch(next(mutant for mutant in MUTANTS if mutant.name == name), 150)


@pytest.mark.slow
@pytest.mark.parametrize("machine", [KVMachine, SchedulerMachine])
def test_nothing_is_found_without_a_bug(machine: type[KVMachine | SchedulerMachine]) -> None:
    """The same examples pass on the code as it is: what they find is the seeded bug."""
    run_state_machine_as_test(machine, settings=quick(MAX_EXAMPLES, 40))


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_seeded_bug_is_found(mutant: Mutant) -> None:
    catch(mutant, MAX_EXAMPLES)


def test_there_are_enough_of_them() -> None:
    assert len(MUTANTS) >= 20
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
