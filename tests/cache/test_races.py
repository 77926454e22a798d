"""Many processes at once, and processes that are killed."""

from __future__ import annotations

import ast
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
from cache_helpers import compiled_cache, fake_entry, forget, job, start

from morphc.caching import Cache
from morphc.errors import MorphcWarning
from morphc.kernels import compile as compiling
from morphc.kernels.cache import counters, inventory, leases, prune, store
from morphc.kernels.compile import triton_options

PROCESSES = 16

COMPILES = """
import os, sys
from cache_helpers import compiled_cache, job, source
from morphc.kernels.cache import counters
jobs = [job(more) for more in range(3)]
gate, opener = os.pipe()
for number in range(int(sys.argv[1])):
    if os.fork() == 0:
        status = 1
        try:
            os.close(opener)
            os.read(gate, 1)
            made = compiled_cache(jobs)
            count = counters.total()
            told = [(one.registers, one.size, one.digest) for one in made], count.hits, count.compiled
            os.write(1, (repr(told) + chr(10)).encode())
            status = 0
        finally:
            sys.stderr.flush()
            compiling._POOL.close()
            os._exit(status)
os.close(opener)
sys.exit(any(os.wait()[1] for _ in range(int(sys.argv[1]))))
"""


def test_sixteen_processes_compile_the_same_at_once(fresh_cache: Path) -> None:
    """One entry each, one compile each, no error, and everybody has the same."""
    process = start("from morphc.kernels import compile as compiling" + COMPILES, str(PROCESSES))
    out, errors = process.communicate(timeout=240)
    assert (process.returncode, errors) == (0, "")
    answers = [ast.literal_eval(line) for line in out.splitlines()]
    assert len(answers) == PROCESSES
    made, hits, compiled = zip(*answers, strict=True)
    assert all(one == made[0] for one in made)
    assert sum(compiled) == 3
    assert sum(hits) == 3 * PROCESSES - 3
    root = fresh_cache / "v1"
    found = inventory.entries(root)
    assert [entry.binaries for entry in found] == [1, 1, 1]
    assert not list(root.rglob(".*"))
    assert not (root / "quarantine").exists()
    assert Cache(root).verify() == []


def compile_in_this_process() -> None:
    """As `_kept` does it, but without a worker that would outlive a kill."""
    from morphc.kernels.compile_worker import _load, build, digest_of, files_of, gpu_target

    for number in range(3):
        made = job(number)
        want = compiling.wanted(made)
        if want.find() is not None:
            continue
        with store.alone(want.root, want.key) as keeping:
            module = _load(str(want.entry / "kernel.py"), f"kernel_{number}", made.source.digest)
            options = triton_options(made.options, made.target)
            kernel = build(
                module.add,
                dict(made.signature),
                dict(made.constants),
                ("x_ptr",),
                options,
                gpu_target(made.target),
            )
            told = {
                "registers": 1,
                "spills": 0,
                "shared": 0,
                "size": len(kernel.kernel),
                "digest": digest_of(kernel),
                "seconds": 0.1,
                "arguments": list(module.add.arg_names),
            }
            assert keeping
            want.keep(files_of(kernel), told)


KILLED = """
import os, signal, sys, time
os.environ.pop("TRITON_INTERPRET", None)
import random
from pathlib import Path
from test_races import compile_in_this_process
from cache_helpers import forget, source
import triton
from morphc.caching import Cache
from morphc.kernels.cache import place
for number in range(3):
    source(number)
folder, count = Path(os.environ["MORPHC_CACHE_DIR"]), int(sys.stdin.readline())
os.environ["MORPHC_CACHE_DIR"] = str(folder / "first")
compile_in_this_process()
forget()
os.environ["MORPHC_CACHE_DIR"] = str(folder / "second")
began = time.monotonic()
compile_in_this_process()
forget()
whole = time.monotonic() - began
chance, killed, finished = random.Random(0), 0, 0
for turn in range(count):
    os.environ["MORPHC_CACHE_DIR"] = str(folder / f"{turn // 4}")
    child = os.fork()
    if child == 0:
        try:
            compile_in_this_process()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    time.sleep(chance.uniform(0.0, whole))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    killed += os.WIFSIGNALED(status)
    finished += status == 0
    assert os.WIFSIGNALED(status) or status == 0, status
    problems = Cache(place.root()).verify()
    assert not problems, problems
    if turn % 4 == 3:
        compile_in_this_process()
        forget()
        assert not Cache(place.root()).verify()
print(killed, finished, flush=True)
"""


def test_a_kill_at_any_moment_leaves_whole_entries(fresh_cache: Path) -> None:
    """Every fourth turn a compile is let through, in the folder that the kills before it left behind."""
    kills = int(os.environ.get("MORPHC_TEST_KILLS", "48"))
    # Each compiles anew: what Triton keeps itself would leave little time to be killed in.
    process = start(KILLED, TRITON_ALWAYS_COMPILE="1")
    out, errors = process.communicate(f"{kills}\n", timeout=60 + 2 * kills)
    assert (process.returncode, errors) == (0, "")
    killed, finished = map(int, out.split())
    assert killed + finished == kills
    # How many depends on the machine's mood.
    assert killed > kills // 12
    for folder in fresh_cache.iterdir():
        root = folder / "v1"
        # What was half-written is seen by nobody, and goes once it is old.
        assert not (root / "quarantine").exists()
        for path in root.rglob(".*"):
            os.utime(path, (1, 1))
        left = [victim for victim in Cache(root).victims() if victim.reason == "was never finished"]
        Cache(root).remove(left)
        assert not list((root / "kernels").glob(".*"))


HOLDS = """
import sys
from cache_helpers import forget, source
from morphc.kernels import codegen
print(codegen.publish(source()).parent.name, flush=True)
sys.stdin.readline()
"""


def test_what_a_living_process_uses_is_not_pruned(filled: Path) -> None:
    fake_entry(filled, 5)
    forget()
    process = start(HOLDS)
    assert process.stdout is not None
    used = process.stdout.readline().strip()
    assert used in inventory.names(filled)
    done = Cache(filled).prune(larger_than=0)
    assert [Path(victim.path).name for victim in done.stayed] == [used]
    assert inventory.names(filled) == [used]
    process.kill()
    process.wait()
    done = Cache(filled).prune(larger_than=0)
    assert [Path(victim.path).name for victim in done.removed] == [used]
    assert inventory.names(filled) == []
    assert leases.in_use(filled) == set()
    assert not list((filled / "locks").glob("use-*"))


def test_a_process_goes_on_though_its_entry_was_removed_by_force(filled: Path) -> None:
    (before,) = compiled_cache([job()])
    shutil.rmtree(filled / "kernels")
    with counters.watch() as count:
        (after,) = compiled_cache([job()])
    assert count.compiled == 1
    # Not the size: the file's path is in the debug information.
    assert (before.registers, before.digest) == (after.registers, after.digest)


def test_an_entry_that_begins_to_be_used_during_a_prune_stays(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget()
    victims = Cache(filled).victims(larger_than=0)
    name = inventory.names(filled)[0]
    answers = iter([set(), {name}])
    monkeypatch.setattr(leases, "in_use", lambda root: next(answers))
    done = prune.remove(filled, victims)
    assert [Path(victim.path).name for victim in done.stayed] == [name]
    monkeypatch.undo()
    assert inventory.names(filled) == [name]
    assert Cache(filled).verify() == []


class TestLocks:
    def test_one_that_somebody_holds_is_not_waited_for_forever(
        self, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        want = compiling.wanted(job())
        code = f"""
        import sys
        from pathlib import Path
        from morphc.kernels.cache import store
        with store.alone(Path({str(want.root)!r}), {want.key!r}) as held:
            print(held, flush=True)
            sys.stdin.readline()
        """
        process = start(code)
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        monkeypatch.setattr(store, "LOCK_SECONDS", 0.2)
        try:
            with pytest.warns(MorphcWarning, match="somebody else holds it.*compiled, and not kept"):
                (made,) = compiled_cache([job()])
        finally:
            process.communicate("\n")
        assert made.size > 0
        assert want.find() is None
        compiled_cache([job()])
        assert want.find() is not None

    def test_a_folder_of_locks_that_is_none(self, fresh_cache: Path) -> None:
        root = fresh_cache / "v1"
        root.mkdir(parents=True)
        (root / "locks").write_text("")
        with pytest.warns(MorphcWarning, match=r"a lock in .*locks can't be had"):
            (made,) = compiled_cache([job()])
        assert made.size > 0
        assert Cache(root).verify() == []

    def test_a_holder_that_was_killed_holds_nothing(self, fresh_cache: Path) -> None:
        want = compiling.wanted(job())
        code = f"""
        from pathlib import Path
        from morphc.kernels.cache import store
        with store.alone(Path({str(want.root)!r}), {want.key!r}) as held:
            print(held, flush=True)
            input()
        """
        process = start(code)
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
        with counters.watch() as count:
            compiled_cache([job()])
        assert count.compiled == 1
        assert want.find() is not None


def test_a_forked_child_has_leases_of_its_own(filled: Path) -> None:
    forget()
    leases.hold(filled, "one")
    queue = multiprocessing.get_context("fork").Queue()

    def child() -> None:
        leases.hold(filled, "two")
        queue.put(sorted(leases.in_use(filled)))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    assert queue.get(timeout=30) == ["one", "two"]
    process.join()
    assert leases.in_use(filled) == {"one"}
