"""Server processes with the chat page on one store, one after another; run as a program by test_crashes.py.

    python served.py STORE SAVE_EVERY_S

For each line on its standard input it forks a server, which prints its process id and port as JSON once it answers; when that
one is gone (killed, as a rule), the next may be asked for. The imports are made once, by the parent. The model counts: one
character a step, 5 ms at least for each, so that a second is at most two hundred characters however slow the machine is.
"""

from __future__ import annotations

import json
import os
import sys

from conftest import Scripted

from lyceum.serve.app import make_app
from lyceum.serve.models import serve
from lyceum.serve.pages import pages
from lyceum.serve.server import Server, ServerConfig, listen, uvicorn_config
from lyceum.serve.service import Service
from lyceum.serve.store import Store
from lyceum.tokens.tokenizer import Tokenizer

PAUSE_S = 0.005
COUNTED = "".join(f"{number:04d} " for number in range(700))


def run(place: str, save_every_s: float, tokenizer: Tokenizer) -> None:
    """Serve until killed."""
    engine = Scripted(tokenizer, lambda asked, params: "yes" if asked == "hi" else COUNTED, PAUSE_S)
    service = Service([serve("demo", engine, tokenizer)])  # type: ignore[arg-type]
    store = Store.open(place, save_every_s=save_every_s)
    config = ServerConfig(port=0)
    listening = listen(config.host, 0)
    told = json.dumps([os.getpid(), listening.getsockname()[1]])
    app = make_app(service, routers=[pages(service, store)])
    Server(uvicorn_config(app, config), told).run(sockets=[listening])


def main() -> None:
    place, save_every_s = sys.argv[1], float(sys.argv[2])
    tokenizer = Tokenizer.train(["user\nassistant\nsystem\ntool\n"] * 50, 330)
    assert len(tokenizer.encode(COUNTED)) == len(COUNTED)  # a character is a token
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            run(place, save_every_s, tokenizer)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
