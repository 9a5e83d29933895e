"""Verifiers that do what verifiers must not, for `test_verifier_pool.py`. Each takes (completion, record)."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
import time

from spark_vl.records import PromptRecord, Verdict


def half(completion: str, record: PromptRecord) -> Verdict:
    return Verdict(0.5, completion)


def not_a_verdict(completion: str, record: PromptRecord) -> float:
    return 1.0


def too_good(completion: str, record: PromptRecord) -> Verdict:
    return Verdict(1.5, completion)


def raises(completion: str, record: PromptRecord) -> Verdict:
    raise KeyError("the verifier's own bug")


def out_of_memory(completion: str, record: PromptRecord) -> Verdict:
    raise MemoryError


def pid(completion: str, record: PromptRecord) -> Verdict:
    return Verdict(1.0, str(os.getpid()))


def received(completion: str, record: PromptRecord) -> Verdict:
    heavy = {"torch", "transformers", "sympy", "PIL", "numpy"} & sys.modules.keys()
    said = {"messages": record.messages, "question": record.question, "heavy": sorted(heavy), "main": main_file()}
    return Verdict(1.0, json.dumps(said))


def main_file() -> str | None:
    return getattr(sys.modules["__main__"], "__file__", None)


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
