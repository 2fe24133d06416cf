"""Writers that are killed with SIGKILL while they stream and judge; run as a program by test_crashes.py.

    python crash.py STORE ROUNDS SAVE_EVERY_S

Each round forks a process that opens the store, streams an answer (a word of five characters every few milliseconds) and
votes again and again on the answers above, and tells through a pipe each vote that was acknowledged and how many words it
has appended. After a random time it is killed. Prints one JSON object a round: what it had told.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time

from lyceum.serve.store import Store

WORD_S = 0.01  # at least; so a second is at most a hundred words, however slow the machine is


def write(place: str, save_every_s: float, out: int) -> None:
    """The process that will be killed."""

    def tell(name: str, value: object) -> None:
        os.write(out, (json.dumps([name, value]) + "\n").encode())

    store = Store.open(place, save_every_s=save_every_s)
    chat = store.new("alice")
    asked = store.say("alice", chat.id, None, "user", "2 + 2?")
    judged = [store.say("alice", chat.id, asked.id, "assistant", text).id for text in ("5", "4")]

    def vote() -> None:
        while True:
            tell("vote", store.judgements.compare("alice", judged, judged[1], reason="right", consent=True).id)

    draft = store.answer("alice", chat.id, asked.id, model="demo")
    tell("message", draft.message)
    threading.Thread(target=vote, daemon=True).start()
    number = 0
    while True:
        draft.append(f"{number:04d} ")
        number += 1
        tell("words", number)
        time.sleep(WORD_S)


def main() -> None:
    place, rounds, save_every_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    for number in range(rounds):
        inside, outside = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(inside)
            write(place, save_every_s, outside)
        os.close(outside)
        told = {"votes": [], "message": "", "words": 0}
        with os.fdopen(inside) as lines:
            first = lines.readline()  # the clock runs from when it streams
            killer = threading.Timer(random.Random(number).uniform(0.2, 2.2), os.kill, (child, signal.SIGKILL))
            killer.start()
            for line in [first, *lines]:
                name, value = json.loads(line)
                if name == "vote":
                    told["votes"].append(value)
                else:
                    told[name] = value
        os.waitpid(child, 0)
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
