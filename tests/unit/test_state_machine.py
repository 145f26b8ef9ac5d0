"""Anything may happen, in any order: the invariants of `helpers.machines` hold."""

from __future__ import annotations

from helpers.machines import KVMachine, SchedulerMachine, quick

TestKVManager = KVMachine.TestCase
TestKVManager.settings = quick(100, 40)

TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = quick(100, 40)
