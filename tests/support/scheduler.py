"""Programs of one launch in any order: the interpreter's, interleaved at every access to memory by a seeded adversary.

Triton's interpreter runs programs one after the other, so that no race and no deadlock could show. Here each program is
a thread that holds a baton while it runs and may have to pass it on before every load, store and atomic operation. At
most ``resident`` programs have begun and not ended, as on a GPU. Memory is weak: what a program stores is seen by
others only from its next release on, as far as a barrier of the program stands between the store and the release, as
another thread than the one that releases may have stored; and what others released may be missed until its own next
acquire.
"""

import contextlib
import functools
import inspect
import random
import re
import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from triton._C.libtriton import ir
from triton.runtime import interpreter

from effkernels.tools.launches import members

PATIENCE = 100_000  # accesses of one launch; the largest here makes some thousand


@dataclass(frozen=True)
class Schedule:
    """One order of programs.

    hold: whom the adversary keeps from running until no other can go on: nobody ("none"); the one that made the "first"
    atomic operation; random ones, for "long"; the "last" to begin; program ``whom`` right "before" or "after" its
    atomic operation number ``when``.
    order: in which programs begin, by number "up", "down", or "shuffled". resident: how many at once.
    switches: how likely another program goes on at an access, where nobody is held.
    prompt: how likely a store is seen by all at once, and a load sees all that others released.
    """

    seed: int = 0
    hold: str = "none"
    whom: int = 0
    when: int = 0
    resident: int = 2
    order: str = "up"
    switches: float = 0.2
    prompt: float = 0.0


class Deadlock(AssertionError):
    """No program can go on."""


class WrongResult(AssertionError):
    """A launch left other bytes than in order."""


class StaleLoad(AssertionError):
    """A load that goes through L1, which other SMs' stores do not reach."""


class _Stop(BaseException):
    """Ends a thread whose launch failed; no ``except Exception`` in between may catch it."""


class _Memory:
    """The storages of a launch's tensors, one behind the other in ``bytes``, which all programs share."""

    def __init__(self, contents):
        """contents: {address: bytes (uint8) before the launch}."""
        self.bases = np.array(sorted(contents), np.uint64)
        self.sizes = [contents[base].size for base in self.bases.tolist()]
        starts = np.cumsum([0, *(-(-size // 64) * 64 for size in self.sizes)])
        self.starts = starts[:-1].astype(np.uint64)
        self.bytes = np.zeros(starts[-1], np.uint8)
        for base, part in self.parts().items():
            part[:] = contents[base]
        self.version = 0  # raised when ``bytes`` change

    def parts(self):
        """{address: its bytes now}."""
        places = zip(self.bases.tolist(), self.starts.astype(int), self.sizes, strict=True)
        return {base: self.bytes[start : start + size] for base, start, size in places}

    def offsets(self, pointers, active, width):
        """Where the active ``pointers`` (uint64) to ``width`` bytes lie in ``bytes``; 0 for others."""
        lanes = pointers[active]
        if not lanes.size:
            return np.zeros_like(pointers)
        slot = int(np.searchsorted(self.bases, lanes[0], "right")) - 1
        base = self.bases[slot]
        if slot < 0 or lanes.min() < base or int(lanes.max() - base) + width > self.sizes[slot]:
            raise IndexError("an access outside of a tensor's storage")
        return np.where(active, pointers - base + self.starts[slot], np.uint64(0))


def _address(array):
    return np.uint64(array.ctypes.data)


class _Program:
    """A program's thread and what it sees: ``view`` is its memory, ``dirty`` marks what it stored and did not publish,
    and ``ordered`` what of that lies before its last barrier."""

    def __init__(self, index, run, memory):
        self.index, self.memory, self.view = index, memory, memory.bytes.copy()
        self.dirty, self.ordered = np.zeros_like(self.view, bool), np.zeros_like(self.view, bool)
        self.atomics, self.held, self.poll, self.stuck_at = 0, False, None, None
        self.baton = threading.Lock()
        self.baton.acquire()
        self.thread = threading.Thread(target=run, args=(self,), daemon=True)
        self.thread.start()

    @property
    def waits(self):
        """Whether it has asked twice for what nobody has changed since."""
        return self.stuck_at == self.memory.version

    def publish(self, which):
        """Others may see the bytes of ``which`` (bool) from now on."""
        if which.any():
            self.memory.version += bool((self.memory.bytes[which] != self.view[which]).any())
            self.memory.bytes[which] = self.view[which]
            self.ordered &= ~which
            self.dirty &= ~which

    def refresh(self):
        """It sees all that others published."""
        np.copyto(self.view, self.memory.bytes, where=~self.dirty)


class Launch:
    """A launch on ``contents``, {address: bytes}, in the order of a schedule; each program calls ``body()``."""

    def __init__(self, body, grid, contents, schedule):
        self.body, self.schedule, self.random = body, schedule, random.Random(schedule.seed)
        self.memory = _Memory(contents)
        self.writers = np.full(self.memory.bytes.shape, -1)  # the program that stored a byte last, or -1
        self.todo = list(np.ndindex(*grid))
        if schedule.order == "shuffled":
            self.random.shuffle(self.todo)
        elif schedule.order == "down":
            self.todo.reverse()
        self.programs, self.resident, self.current, self.error = len(self.todo), [], None, None
        self.ended = []  # whose last stores need not be seen yet
        self.accesses, self.atomics, self.switches = 0, [0] * self.programs, 0
        self.numbers = {index: number for number, index in enumerate(np.ndindex(*grid))}
        self.done = threading.Lock()
        self.done.acquire()

    def run(self):
        """Raises Deadlock, or what a program raises. Then ``memory.parts()`` are the results."""
        with self._memory_of_the_interpreter():
            self._begin_programs()
            self._choose().baton.release()
            self.done.acquire()
            for program in self.resident:  # of a launch that failed
                program.baton.release()
                program.thread.join()
        if self.error is not None:
            raise self.error

    def _run_program(self, program):
        program.baton.acquire()
        try:
            self._enter(program)
            self.body()
            self.resident.remove(program)
            self.ended.append(program)
            self._begin_programs()
            if self.resident:
                self._choose().baton.release()
            else:
                self._publish_all()
                self.done.release()
        except _Stop:
            pass
        except Exception as error:
            self.error = error
            self.done.release()

    def _publish_all(self):
        for program in [*self.ended, *self.resident]:
            program.publish(program.dirty)
        self.ended.clear()

    def _fail(self, error):
        self.error = error
        self.done.release()
        raise _Stop

    def _begin_programs(self):
        while self.todo and len(self.resident) < self.schedule.resident:
            self.resident.append(_Program(self.todo.pop(0), self._run_program, self.memory))
            self.resident[-1].held = self.schedule.hold == "last" and not self.todo

    def _enter(self, program):
        """``program`` was given the baton."""
        if self.error is not None:
            raise _Stop
        self.current = program
        interpreter.interpreter_builder.grid_idx = program.index

    def _choose(self):
        """Who goes on: of those that do not wait one that is not held, or else one that is, from now on no longer."""
        ready = [p for p in self.resident if not p.waits]
        if not ready:
            self._publish_all()  # a store is seen some day, without a release too
            ready = [p for p in self.resident if not p.waits]
        if not ready:
            who = ", ".join(str(self.numbers[p.index]) for p in self.resident)
            rest = f"{len(self.todo)} of {self.programs} have not begun"
            self._fail(Deadlock(f"programs {who} wait; {rest} ({self.schedule})"))
        chosen = self.random.choice([p for p in ready if not p.held] or ready)
        chosen.held = False
        return chosen

    def _before_access(self, atomic=False):
        """The program that is about to access memory, when it may."""
        program, schedule = self.current, self.schedule
        self.accesses += 1
        if self.accesses > PATIENCE:
            self._fail(Deadlock(f"no end after {PATIENCE} accesses ({schedule})"))
        mine = self.numbers[program.index] == schedule.whom and program.atomics == schedule.when
        program.held |= atomic and schedule.hold == "before" and mine
        program.held |= schedule.hold == "long" and self.random.random() < 0.02
        if program.held or program.waits or self.random.random() < schedule.switches:
            following = self._choose()
            if following is not program:
                self.switches += 1
                following.baton.release()
                program.baton.acquire()
                self._enter(program)
        if not atomic:
            program.poll = program.stuck_at = None
        return program

    # ---- what a program does ---------------------------------------------------------------------------------------

    def load(self, pointers, active, other, dtype, cached):
        program = self._before_access()
        if self.random.random() < self.schedule.prompt:
            for ended in self.ended:
                ended.publish(ended.dirty)
            program.refresh()
        at = self.memory.offsets(pointers, active, dtype.itemsize)
        if cached and not np.isin(self.writers[at[active].astype(np.int64)], (-1, self.numbers[program.index])).all():
            self._fail(StaleLoad("what another program of the launch stored was loaded through L1, not by .cg"))
        return interpreter._interpreter.load(at + _address(program.view), active, other, dtype)

    def store(self, pointers, active, value):
        program = self._before_access()
        at = self.memory.offsets(pointers, active, value.dtype.itemsize)
        interpreter._interpreter.store(at + _address(program.view), value, active)
        where = (at[active].astype(np.int64)[:, None] + np.arange(value.dtype.itemsize)).ravel()
        self.writers[where] = self.numbers[program.index]
        program.dirty[where] = True
        program.ordered[where] = False
        if self.random.random() < self.schedule.prompt:
            program.publish(program.dirty)

    def barrier(self):
        np.copyto(self.current.ordered, self.current.dirty)

    def atomic(self, pointers, active, width, sem, operate):
        """``operate(pointers)`` does it there and returns the values before."""
        program, schedule = self._before_access(atomic=True), self.schedule
        at = self.memory.offsets(pointers, active, width)
        where = (at[active].astype(np.int64)[:, None] + np.arange(width)).ravel()
        touched = np.zeros_like(program.dirty)
        touched[where] = True
        for earlier in (*self.ended, program):  # accesses to one place stay in order
            earlier.publish(touched & earlier.dirty)
        if sem in ("RELEASE", "ACQUIRE_RELEASE"):
            program.publish(program.ordered)
        before = self.memory.bytes[where]
        old = operate(at + _address(self.memory.bytes))
        after = self.memory.bytes[where]
        changed = bool((before != after).any())
        self.memory.version += changed
        program.view[where] = after
        if sem in ("ACQUIRE", "ACQUIRE_RELEASE"):
            program.refresh()
        poll = None if changed else (tuple(where), after.tobytes())
        program.stuck_at = self.memory.version if poll is not None and poll == program.poll else None
        program.poll = poll
        mine = self.numbers[program.index] == schedule.whom and program.atomics == schedule.when
        program.held |= schedule.hold == "after" and mine
        program.held |= schedule.hold == "first" and not any(self.atomics)
        program.atomics += 1
        self.atomics[self.numbers[program.index]] += 1
        return old

    @contextlib.contextmanager
    def _memory_of_the_interpreter(self):
        """Within: accesses of interpreted programs come here."""
        builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
        rmw, cas = builder.create_atomic_rmw, builder.create_atomic_cas

        def active(pointers, mask):
            return np.ascontiguousarray(np.broadcast_to(np.asarray(mask.data, bool), pointers.data.shape))

        def masked_load(_, ptrs, mask, other, cache_modifier, *args, **kwargs):
            cached = cache_modifier != ir.CACHE_MODIFIER.CG
            element = ptrs.get_element_ty()
            dtype = interpreter._get_np_dtype(element)
            other = np.zeros_like(ptrs.data, dtype=dtype) if other is None else other.data
            return handle(self.load(ptrs.data, active(ptrs, mask), other, dtype, cached), element)

        def masked_store(_, ptrs, value, mask, *args, **kwargs):
            self.store(ptrs.data, active(ptrs, mask), np.ascontiguousarray(value.data))

        def atomic_rmw(builder, op, ptr, val, mask, sem, scope):
            def operate(at):
                return rmw(builder, op, handle(at, ptr.dtype), val, mask, sem, scope)

            return self.atomic(ptr.data, active(ptr, mask), val.data.itemsize, sem.name, operate)

        def atomic_cas(builder, ptr, cmp, val, sem, scope):
            def operate(at):
                return cas(builder, handle(at, ptr.dtype), cmp, val, sem, scope)

            return self.atomic(ptr.data, np.ones(ptr.data.shape, bool), val.data.itemsize, sem.name, operate)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(builder, "create_masked_load", masked_load)
            patch.setattr(builder, "create_masked_store", masked_store)
            patch.setattr(builder, "create_atomic_rmw", atomic_rmw)
            patch.setattr(builder, "create_atomic_cas", atomic_cas)
            patch.setattr(builder, "create_barrier", lambda _: self.barrier())
            yield


@dataclass(frozen=True)
class Recorded:
    """A launch that ran in order: the interpreted function, its arguments, every storage's bytes before and after."""

    function: object
    args: tuple
    kwargs: dict
    grid: tuple
    before: dict
    after: dict

    @property
    def name(self):
        return self.function.__name__

    @property
    def programs(self):
        return int(np.prod(self.grid))

    @functools.cached_property
    def atomics(self):
        """How many atomic operations each program makes, one after the other."""
        return self.run(Schedule(switches=0.0, prompt=1.0)).atomics

    def run(self, schedule: Schedule) -> Launch:
        """Once more in another order; Deadlock, or WrongResult where a byte differs."""
        fn = self.function.rewrite()
        kwargs = {k: v for k, v in self.kwargs.items() if k in self.function.arg_names}
        given = inspect.getcallargs(fn, *self.args, **kwargs)
        constants = interpreter.GridExecutor(fn, self.function.arg_names, self.grid).constexprs
        scope = interpreter._patch_lang(fn)
        try:
            arguments = {name: v if name in constants else interpreter._implicit_cvt(v) for name, v in given.items()}
            grid = (*self.grid, 1, 1)[:3]
            interpreter.interpreter_builder.set_grid_dim(*grid)
            launch = Launch(lambda: fn(**arguments), grid, self.before, schedule)
            launch.run()
        finally:
            scope.restore()
        different = [base for base, part in launch.memory.parts().items() if not np.array_equal(part, self.after[base])]
        if different:
            found = [item for name, value in given.items() for item in tensors(name, value).items()]
            names = {t.untyped_storage().data_ptr(): path for path, t in found}
            which = ", ".join(names[base] for base in different)
            raise WrongResult(f"{self.name}: {which} differ from the run in order ({schedule})")
        return launch

    def schedules(self, count, most_resident=8):
        """``count`` different ones, of every adversary in turn; those that hold a provider go through all of them."""
        providers = [(whom, when) for whom, n in enumerate(self.atomics) for when in range(n)]
        choice = random.Random(self.name)
        choice.shuffle(providers)
        holds = ("first", "before", "long", "after", "last", "none")
        for seed in range(count):
            hold, turn = holds[seed % len(holds)], seed // len(holds)
            whom, when = providers[turn % len(providers)]
            yield Schedule(
                seed=seed,
                hold=hold,
                whom=whom,
                when=when,
                resident=choice.choice([2, 3, most_resident, self.programs]),
                order=choice.choice(["up", "down", "shuffled"]),
                switches=choice.choice([0.02, 0.2]),
                prompt=choice.choice([0.0, 0.0, 0.5, 1.0]),
            )


def tensors(name, value):
    """{path: tensor} of one argument."""
    return {path: v for path, v in members(name, value).items() if isinstance(v, torch.Tensor)}


def _contents(args, kwargs):
    found = [t for name, v in [*enumerate(args), *kwargs.items()] for t in tensors(str(name), v).values()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in found}
    return {
        base: torch.empty(0, dtype=torch.uint8).set_(s).numpy().copy() for base, s in storages.items() if s.nbytes()
    }


@contextlib.contextmanager
def record(names):
    """Within: launches of the kernels of these names are kept, as ``Recorded``, in the list this yields."""
    kept, run = [], interpreter.InterpretedFunction.run

    def recording(self, *args, grid, warmup, **kwargs):
        if self.__name__ not in names:
            return run(self, *args, grid=grid, warmup=warmup, **kwargs)
        before = _contents(args, kwargs)
        run(self, *args, grid=grid, warmup=warmup, **kwargs)
        kept.append(Recorded(self, args, kwargs, tuple(grid), before, _contents(args, kwargs)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "run", recording)
        yield kept


@contextlib.contextmanager
def mutated(function, pattern, new):
    """Within: the interpreted ``function`` runs with ``new`` where its source first matches ``pattern``."""
    lines, _ = inspect.getsourcelines(function.fn)
    rewriter = interpreter.FunctionRewriter(function.fn, **function.kwargs)
    rewriter.filename, rewriter.def_file_lineno = rewriter._get_jit_fn_file_line()
    rewriter.def_lineno = rewriter._find_def(lines)
    source, count = re.subn(pattern, new, rewriter._prepare_source(lines), count=1, flags=re.DOTALL)
    assert count, f"{function.__name__} no longer matches {pattern!r}"
    compiled = rewriter._compile_and_exec(rewriter._transform_ast(source))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(interpreter.InterpretedFunction.rewritten_fn, function.fn, compiled)
        yield
