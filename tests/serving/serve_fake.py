"""A server in a process of its own; a token comes for each line of its standard input,
and all after its end."""

import sys

from maxlm.serving.engine_loop import EngineLoop
from maxlm.serving.server import bind_socket, run_server
from maxlm.serving.server_state import ServerState
from tests.serving.fake_engine import FakeEngine
from tests.serving.running import train_chat_tokenizer

if __name__ == "__main__":
    tokenizer = train_chat_tokenizer()
    engine = FakeEngine(tokenizer, lambda text, request: "abcdef")
    engine.before_step = lambda: sys.stdin.readline() and None
    state = ServerState("fake", tokenizer, 512, tokenizer.encode, EngineLoop(engine))
    run_server(state, bind_socket("127.0.0.1", 0), lambda url: print(url, flush=True))
