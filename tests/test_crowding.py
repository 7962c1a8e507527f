"""Waiting threads that sleep early while other processes want the cores."""

import os
import subprocess
import sys
import threading
import time

import pytest

from jitexport import crowding
from jitexport.crowding import CALM, CROWDED, INTERVAL, Sleepers, Watch

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")


class World:
    """A clock, the time that threads waited, and the threads that were added, by hand."""

    def __init__(self):
        self.now, self.waited, self.others, self.made, self.dismissed = 0.0, 0.0, False, [], 0

    def sleepers(self, count):
        self.made.append(count)
        return self

    def dismiss(self):
        self.dismissed += 1

    def watch(self):
        return Watch(lambda: self.now, lambda: self.waited, lambda threads: self.others, self.sleepers)

    def passes(self, seconds, waiting):
        """Of that time, a share in which threads had no core."""
        self.now += seconds
        self.waited += seconds * waiting if self.waited is not None else 0


def test_free_cores_change_nothing():
    world = World()
    watch = world.watch()
    watch.begin()
    for _ in range(50):
        world.passes(0.1, CROWDED / 2)
        watch.look()
    assert not watch.crowded and not world.made


def test_crowded_cores_are_found_at_the_first_step_and_left_when_it_is_calm():
    world = World()
    watch = world.watch()
    watch.begin()
    world.passes(0.1, 2 * CROWDED)
    watch.look()
    assert watch.crowded and world.made == [crowding.sleepers_needed()]
    for _ in range(5):
        world.passes(1.0, 2 * CROWDED)
        watch.look()
    assert watch.crowded and len(world.made) == 1  # once
    world.passes(CALM / 2, 0)
    watch.look()
    assert watch.crowded
    world.passes(CALM, 0)
    watch.look()
    assert not watch.crowded and world.dismissed == 1
    world.passes(0.1, 2 * CROWDED)
    watch.look()
    assert watch.crowded and len(world.made) == 2


def test_cores_that_are_taken_before_the_first_step():
    world = World()
    world.others = True
    watch = world.watch()
    watch.begin()
    assert watch.crowded
    world.others = False
    world.passes(CALM + 1, 0)
    watch.begin()
    assert not watch.crowded


def test_looks_that_follow_each_other_closely_tell_nothing():
    world = World()
    watch = world.watch()
    watch.look()  # before any beginning
    watch.begin()
    world.passes(INTERVAL / 2, 1.0)
    watch.look()
    assert not watch.crowded
    world.passes(INTERVAL, 1.0)
    watch.look()
    assert watch.crowded


def test_systems_that_do_not_tell():
    world = World()
    world.waited, world.others = None, True
    watch = world.watch()
    watch.begin()
    watch.look()
    assert not watch.crowded and not world.made


def tasks():
    return len(os.listdir("/proc/self/task"))


@linux
def test_sleepers_are_threads_that_end():
    before = tasks()
    sleepers = Sleepers(3)
    assert tasks() == before + 4  # and the one whose pool they are in
    sleepers.dismiss()
    until = time.monotonic() + 10
    while tasks() > before and time.monotonic() < until:  # the last of them may still be on their way out
        time.sleep(0.01)
    assert tasks() == before


@linux
def test_a_core_that_is_shared_is_seen():
    """In a process of its own, which is to be bound to one core beside another that is always busy."""
    code = """
import os, subprocess, sys, time
from jitexport.crowding import Watch, waiting_seconds
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
try:
    watch = Watch(others=lambda threads: False)
    watch.begin()
    until = time.monotonic() + 5
    while not watch.crowded and time.monotonic() < until:
        sum(range(100_000))
        watch.look()
    print(watch.crowded, waiting_seconds() > 0)
finally:
    busy.kill()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert run.stdout.split() == ["True", "True"]


@linux
def test_running_threads_are_counted():
    assert not crowding.others_run(-10_000) and crowding.others_run(10_000)


def test_threads_do_not_look_at_once():
    """One that finds another looking goes on with its work."""
    world = World()
    watch = world.watch()
    watch.begin()
    world.passes(1.0, 1.0)
    with watch._lock:
        looker = threading.Thread(target=watch.look)
        looker.start()
        looker.join(10)
        assert not looker.is_alive()
    assert not watch.crowded
