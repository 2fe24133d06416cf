"""Server processes that work on batches in one store, one after another; run as a program by test_batches.py.

    python batched.py FOLDER LEASE_S

For each line on its standard input it forks a server, which prints its process id and port as JSON once it answers; when that
one is gone (killed, as a rule), the next may be asked for. The imports are made once, by the parent. The model repeats what it
was asked, one character a step, 3 ms at least for each.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from conftest import Scripted

from lyceum.serve.app import make_app
from lyceum.serve.batch import kept, work
from lyceum.serve.batch.routes import batches
from lyceum.serve.files.kept import Files
from lyceum.serve.files.routes import file_routes
from lyceum.serve.models import serve
from lyceum.serve.responses.desk import Desk
from lyceum.serve.server import Server, ServerConfig, listen, uvicorn_config
from lyceum.serve.service import Service
from lyceum.serve.store import Store
from lyceum.tokens.tokenizer import Tokenizer

PAUSE_S = 0.003


def run(folder: Path, lease_s: float, tokenizer: Tokenizer) -> None:
    """Serve until killed."""
    kept.LEASE_S = work.LEASE_S = lease_s
    engine = Scripted(tokenizer, lambda asked, params: f"you said {asked}", PAUSE_S)
    service = Service([serve("demo", engine, tokenizer)])  # type: ignore[arg-type]
    store = Store.open(folder / "store.sqlite")
    files = Files(store.database, folder / "files")
    working = work.Work(service, store.batches, files, Desk(service, store))
    config = ServerConfig(port=0)
    listening = listen(config.host, 0)
    told = json.dumps([os.getpid(), listening.getsockname()[1]])
    app = make_app(service, routers=[file_routes(service, files), batches(working)])
    Server(uvicorn_config(app, config), told).run(sockets=[listening])


def main() -> None:
    folder, lease_s = Path(sys.argv[1]), float(sys.argv[2])
    tokenizer = Tokenizer.train(["user\nassistant\nsystem\ntool\n"] * 50, 330)
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            run(folder, lease_s, tokenizer)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
