"""Verifiers that do what verifiers must not, for `test_verifier_pool.py`. Each takes (completion, record)."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time

from spark_vl.records import ImageSize, PromptRecord, Verdict


def half(completion: str, record: PromptRecord) -> Verdict:
    return Verdict(0.5, completion)


def half_are_right(completion: str, record: PromptRecord) -> Verdict:
    """What random weights say is right or wrong by its length, and quotable."""
    return Verdict(float(len(completion) % 2), completion.strip()[:8] or None)


class Counting:
    """Remembers how many completions it has seen."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, completion: str, record: PromptRecord) -> Verdict:
        self.seen += 1
        return Verdict(1.0, str(self.seen))


def not_a_verdict(completion: str, record: PromptRecord) -> str:
    return "1.0"


def too_good(completion: str, record: PromptRecord) -> Verdict:
    return Verdict(1.5, completion)


def raises(completion: str, record: PromptRecord) -> Verdict:
    raise KeyError("the verifier's own bug")


def pid(completion: str, record: PromptRecord) -> Verdict:
    return Verdict(1.0, str(os.getpid()))


def received(completion: str, record: PromptRecord) -> Verdict:
    heavy = {"torch", "transformers", "sympy", "PIL", "numpy"} & sys.modules.keys()
    said = {"messages": record.messages, "question": record.question, "heavy": sorted(heavy), "main": main_file()}
    return Verdict(1.0, json.dumps(said))


def main_file() -> str | None:
    return getattr(sys.modules["__main__"], "__file__", None)


def even(completion: str, record: PromptRecord) -> Verdict:
    """Well behaved: 1 if the completion and the gold have an even number of characters together."""
    return Verdict(float((len(completion) + len(record.gold)) % 2 == 0), completion)


def what_it_needs(completion: str, record: PromptRecord) -> Verdict:
    """Well behaved: its own setting if it gets the image's sizes and the choices, else 0."""
    complete = record.image_sizes == (ImageSize((100, 50), (56, 28)),) and record.choices == ("a",)
    return Verdict(dict(record.settings)["threshold"] if complete else 0.0, completion)


held: list[bytes] = []
"""Never let go of."""


class Picky(Exception):
    """Can be pickled, but not read back."""

    def __init__(self, found: str, allowed: str) -> None:
        super().__init__(f"{found}, not {allowed}")


def write_to_all_descriptors(message: bytes) -> None:
    for descriptor in range(1000):
        with contextlib.suppress(OSError):
            os.write(descriptor, message)


def obey(completion: str, record: PromptRecord) -> Verdict:
    """Does what the completion says."""
    command, _, argument = completion.partition(" ")
    if command == "hang":
        while True:
            time.sleep(60)
    elif command == "hang_in_c":
        9**9**9**9  # holds the interpreter's lock
    elif command == "ignore_signals":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)
        time.sleep(60)
    elif command == "start_child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        with open(argument, "w") as file:
            file.write(f"{os.getpid()} {child.pid}")
        time.sleep(60)
    elif command == "signal_child":
        with subprocess.Popen(["sleep", "60"]) as child:
            child.send_signal(int(argument))
        assert child.returncode == -int(argument)
    elif command == "catastrophic_regex":
        re.match(r"(a|a)+$", "a" * 60 + "b")
    elif command == "hold_the_lock_later":
        threading.Timer(0.2, pow, (9, 9**9**2)).start()
    elif command == "eat_memory":
        while True:
            held.append(bytes(10 * 2**20))
    elif command == "hide_that_memory_is_eaten":
        try:
            bytearray(2**50)
        except MemoryError as error:
            return Verdict(0.0, None, "error", f"cannot compare with the gold: {type(error).__name__}")
    elif command == "leak":
        held.append(bytes(int(argument) * 2**20))
    elif command == "abort":
        os.abort()  # as C libraries do that are refused memory
    elif command == "kill":
        os.kill(os.getpid(), signal.SIGKILL)  # as the system does where memory runs out
    elif command == "fork":
        os.fork()  # and both go on
    elif command == "start_children_and_die":
        children = [subprocess.Popen(["sleep", "60"]) for _ in range(3)]
        with open(argument, "w") as file:
            file.write(" ".join(str(child.pid) for child in children))
        faulthandler._sigsegv()
    elif command == "close_descriptors":
        os.closerange(3, 1000)
    elif command == "keyboard_interrupt":
        raise KeyboardInterrupt
    elif command == "not_picklable":
        return Verdict(1.0, completion, shaping=(("length", lambda: 1.0),))
    elif command == "not_to_be_read_back":
        return Verdict(1.0, completion, shaping=(("length", Picky("1", "2")),))
    elif command == "write_garbage":
        write_to_all_descriptors(b"garbage\n")
    elif command == "stop_in_the_middle":
        write_to_all_descriptors(struct.pack("!i", 10**6) + b"the beginning of a verdict")
        os.kill(os.getpid(), signal.SIGSTOP)
    elif command == "leave_a_timer":
        signal.setitimer(signal.ITIMER_REAL, float(argument))
    elif command == "print_megabytes":
        for descriptor in (1, 2):
            for _ in range(int(argument)):
                os.write(descriptor, b"x" * 2**20)
    elif command == "exit":
        os._exit(7)
    elif command == "sys_exit":
        sys.exit(7)
    elif command == "segfault":
        faulthandler._sigsegv()
    elif command == "print":
        print("printed by a verifier")
    elif command == "sleep":
        time.sleep(float(argument))
    return Verdict(1.0, completion)


def half_a_character(completion: str, record: PromptRecord) -> Verdict:
    """Parses what no file and no tokenizer takes; the longer half of the completions is right."""
    return Verdict(float(len(completion) % 2), f"{completion[:9]}\ud83d", "ok", "half \udc80")


def complains_of_half_a_character(completion: str, record: PromptRecord) -> Verdict:
    raise ValueError("half \ud83d")
