"""Requests that cannot be served: a status of 400 to 499 that says why, and the next request is served."""

import contextlib
import http.client
import json
import socket
import time

import openai
import pytest

from lowbit.errors import UsageError
from lowbit.serve import app, limits
from lowbit.serve.limits import read_keys, require_guard
from lowbit.serve.run import listen
from tests.serve.conftest import serving

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}
TEXT = {"model": "tiny", "prompt": "a"}
HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 60\r\n\r\n"
)
NUMBERS = b"[" + b"1," * 500_000 + b"1]"


@pytest.fixture(autouse=True)
def _goes_on(served):
    """After each of these tests the server writes the same as before."""
    yield
    got = served.client.completions.create(model="tiny", prompt="hello", max_tokens=5, temperature=0)
    assert got.choices[0].text == served.model.generate(["hello"], max_new_tokens=5)[0].text


@pytest.mark.parametrize(
    ("path", "changes", "message", "param"),
    [
        ("completions", {"model": "gpt-4"}, "model 'gpt-4' is not served here; 'tiny' is", "model"),
        ("completions", {"max_tokens": -1}, "max_tokens: Input should be greater than or equal to 0", "max_tokens"),
        ("completions", {"max_tokens": "5"}, "max_tokens: Input should be a valid integer", "max_tokens"),
        ("completions", {"temperature": -1}, "temperature is -1.0: it must lie between 0 and 100", None),
        ("completions", {"temperature": float("nan")}, "temperature: Input should be a finite number", "temperature"),
        ("completions", {"top_p": 2}, "top_p is 2.0", None),
        ("completions", {"seed": 1 << 80}, "seed is", None),
        ("completions", {"n": 129}, "n: Input should be less than or equal to 128", "n"),
        ("completions", {"n": 66}, "66 requests at once are more than the 64 that may wait: ask for fewer", None),
        ("completions", {"prompt": [[1]] * 200_000, "n": 128}, "25600000 requests at once are more than the 64", None),
        ("completions", {"temperature": 1e-40}, "temperature is 1e-40: it must be 0, or at least 1e-30", None),
        ("completions", {"logit_bias": {"05": 1}}, "logit_bias: '05' is no token id", "logit_bias"),
        ("completions", {"model": "a" * 1000}, "model '" + "a" * 300 + "' is not served here", "model"),
        ("completions", {"prompt": None}, "prompt: Field required", "prompt"),
        ("completions", {"structured_outputs": {"json": 5}}, "structured_outputs.json", "structured_outputs.json"),
        ("completions", {"structured_outputs": {"json": False}}, "the schema is false", "structured_outputs"),
        ("completions", {"stop": ["a"] * 100_000}, "at most 64 items", None),
        ("completions", {"stop": [""]}, "stop", None),
        ("completions", {"prompt": []}, "prompt: a text, a list of token ids, or a list of either", "prompt"),
        ("completions", {"prompt": ""}, "the prompt is empty", None),
        ("completions", {"prompt": [[1], "a"]}, "prompt: a text", "prompt"),
        ("completions", {"prompt": [999]}, "token 999 is none of the model's 260", None),
        ("completions", {"prompt": [10**30]}, "is none of the model's 260", None),
        ("completions", {"prompt": "a" * 200}, "200 tokens, the engine's context is 128", None),
        ("completions", {"stop_token_ids": [-1]}, "stop token -1", None),
        (
            "completions",
            {"temprature": 1},
            "the field 'temprature' is not known here; did you mean 'temperature'?",
            None,
        ),
        ("completions", {"logit_bias": {"a": 1}}, "logit_bias: 'a' is no token id", "logit_bias"),
        ("completions", {"logit_bias": {"999": 1}}, "biased token 999 is none of the model's 260", None),
        ("completions", {"logit_bias": {"5": 101}}, "the bias of token 5 is 101.0: it must lie between", None),
        ("completions", {"logit_bias": {str(i): 1 for i in range(2000)}}, "at most 1024 items", "logit_bias"),
        ("completions", {"logprobs": 1000}, "logprobs: Input should be less than or equal to 20", "logprobs"),
        ("completions", {"best_of": 3}, "best_of", None),
        ("chat/completions", {"messages": []}, "messages: List should have at least 1 item", "messages"),
        ("chat/completions", {"messages": "hi"}, "messages: Input should be a valid array", "messages"),
        ("chat/completions", {"messages": [{"role": "god", "content": ""}]}, "messages.role", None),
        ("chat/completions", {"messages": [{"role": "user"}] * 5000}, "5000 parts are more than 4096", "messages"),
        ("chat/completions", {"messages": CHAT["messages"] * 50}, "the engine's context is 128", None),
        ("chat/completions", {"tool_choice": 5}, "tool_choice: Input should be an object", "tool_choice"),
        ("chat/completions", {"top_logprobs": 3}, "top_logprobs needs logprobs: true", "top_logprobs"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "a part of type 'image_url': only text is read here",
            None,
        ),
    ],
)
def test_it_is_refused_with_the_reason(served, path, changes, message, param):
    body = (TEXT if path == "completions" else CHAT) | changes
    for stream in (False, True):
        status, answer = served.send("POST", f"/v1/{path}", body | {"stream": stream})
        error = json.loads(answer)["error"]
        assert status in (400, 404)
        assert message in error["message"]
        assert set(error) == {"message", "type", "param", "code"}
        assert param is None or error["param"] == param


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "Invalid JSON"),
        (b"{", 400, "Invalid JSON"),
        (b"[]", 400, "should be an object"),
        (b'{"model": "\xff\xfe"}', 400, "Invalid JSON: invalid unicode"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', 400, "Invalid JSON"),
        (b"[" * 100_000, 400, "recursion limit exceeded"),
        (b'{"a":' * 100_000, 400, "recursion limit exceeded"),
        (b'{"model": "tiny", "messages": ' + NUMBERS + b"}", 400, "500001 parts are more than 4096"),
        (b'{"model": "tiny", "prompt": ' + NUMBERS + b"}", 400, "500001 tokens, the engine's context is 128"),
        (b" " * (2 << 20), 413, "the body has 2097152 bytes; at most 1056768 are taken"),
    ],
)
def test_a_body_that_is_no_request(served, body, status, message):
    for path in ("chat/completions", "completions") if b"prompt" not in body else ("completions",):
        got, answer = served.send("POST", f"/v1/{path}", body)
        assert got == status
        if b"messages" not in body or path == "chat/completions":
            assert message in json.loads(answer)["error"]["message"]


def test_paths_methods_and_types_that_do_not_exist(served):
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("PUT", "/metrics", 405),
    ):
        got, answer = served.send(method, path)
        assert (got, json.loads(answer)["error"]["type"]) == (
            status,
            "not_found_error" if status == 404 else "invalid_request_error",
        )
    assert served.send("HEAD", "/health") == (200, b"")
    with served.asked("GET", "/v1/completions") as answer:
        assert answer.headers["Allow"] == "POST"
    for name, wrong, cure in (
        ("Content-Type", "text/plain", b"send Content-Type: application/json"),
        ("Content-Encoding", "gzip", b"coded as 'gzip': send it as it is"),
    ):
        status, answer = served.send("POST", "/v1/completions", TEXT, **{name: wrong})
        assert status == 415
        assert cure in answer
    assert served.send("POST", "/v1/completions", TEXT, **{"Content-Encoding": "identity"})[0] == 200
    with pytest.raises(openai.NotFoundError, match="not served here"):
        served.client.models.retrieve("other")


@pytest.mark.parametrize(
    ("sent", "status", "message"),
    [
        (b"\x16\x03\x01\x00\xff\xff nonsense\r\n\r\n", 400, "illegal request line"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nbad header\r\n\r\n", 400, "illegal header line"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "Missing mandatory Host: header"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nA: " + b"a" * (80 << 10), 431, "Receive buffer too long"),
        (HEAD.replace(b"Content-Length: 60", b"Transfer-Encoding: gzip"), 501, "Only Transfer-Encoding: chunked"),
        (HEAD.replace(b"Content-Length: 60", b"Transfer-Encoding: chunked") + b"no number\r\n", 400, "illegal chunk"),
    ],
)
def test_what_is_no_http_is_answered_like_other_errors(served, sent, status, message):
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall(sent)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert (answer.status, answer.headers["Connection"]) == (status, "close")
        error = json.loads(answer.read())["error"]
    assert error["message"].startswith("the request is no valid HTTP: ")
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_open_requests_have_a_limit(served, monkeypatch):
    monkeypatch.setattr(app, "OPEN", 1)
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall(HEAD)  # its body never comes
        until = time.monotonic() + 10
        while (got := served.send("GET", "/health"))[0] != 503 and time.monotonic() < until:
            time.sleep(0.01)
    assert (got[0], json.loads(got[1])["error"]["type"]) == (503, "server_error")
    while served.send("GET", "/health")[0] != 200 and time.monotonic() < until:
        time.sleep(0.01)  # the server has yet to see that the connection ended


def test_connections_that_end_in_the_middle(served):
    body = json.dumps(TEXT | {"max_tokens": 100, "n": 3}).encode().ljust(60)
    for sent in (b"POST /v1/comp", HEAD, HEAD + body[:20], HEAD + body, b"\x16\x03\x01\x00\xff\xff nonsense\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)


def test_a_body_that_does_not_arrive_is_not_waited_for(served, monkeypatch):
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall(HEAD + b"{")
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_a_connection_that_asks_nothing_is_closed(served, monkeypatch):
    monkeypatch.setattr(limits, "HEAD_SECONDS", 0.2)
    for sent in (b"", HEAD[:30]):
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
            connection.sendall(sent)
            assert connection.recv(100) == b""
    asked = TEXT | {"max_tokens": 100, "extra_body": {"ignore_eos": True}}
    with served.client.completions.create(**asked, stream=True) as stream:  # a long answer goes on
        assert len([time.sleep(0.01) for _ in stream]) > 20


CHUNKED = HEAD.replace(b"Content-Length: 60", b"Transfer-Encoding: chunked")
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
RAW = {
    "a gigabyte is said to come": (HEAD.replace(b"60", b"1073741824") + b"{", b"413"),
    "a length below zero": (HEAD.replace(b"60", b"-5"), b"400"),
    "two lengths": (HEAD.replace(b"Content-Length: 60", b"Content-Length: 5\r\nContent-Length: 6"), b"400"),
    "a large header": (GET + b"X: " + b"a" * (1 << 20) + b"\r\n\r\n", b"431"),
    "many headers": (GET + b"".join(b"X%d: a\r\n" % i for i in range(20_000)) + b"\r\n", b"431"),
    "a long path": (GET.replace(b"health", b"a" * 60_000) + b"\r\n", b"404"),
    "chunks beyond the limit": (CHUNKED + (b"10000\r\n" + b" " * 65536 + b"\r\n") * 40, b"413"),
    "chunks of a byte": (CHUNKED + b"1\r\n \r\n" * 300_000, b"400"),
    "a chunk whose extension has no end": (CHUNKED + b"1;" + b"a" * (2 << 20), b"431"),
    "a million stop strings": (HEAD.replace(b"60", b"5000000") + b'{"stop": [' + b'"a",' * 1_000_000, b"413"),
    "another protocol": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"404"),
}


@pytest.mark.parametrize("attack", RAW)
def test_bytes_that_are_no_request_of_ours(served, attack):
    sent, status = RAW[attack]
    begin = time.monotonic()
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        with contextlib.suppress(OSError):  # the server closes before it has read all
            connection.sendall(sent)
        assert connection.recv(64).split()[1] == status
    assert served.send("GET", "/health")[0] == 200
    assert time.monotonic() - begin < 5


def test_requests_one_after_another_on_a_connection_are_answered_in_order(served):
    body = json.dumps(TEXT | {"max_tokens": 1}).encode().ljust(60)
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as connection:
        connection.sendall((HEAD + body + GET + b"\r\n") * 20 + GET + b"Connection: close\r\n\r\n")
        got = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert got.count(b"HTTP/1.1 200") == 41
    assert got.count(b"text_completion") == 20
    assert got.rfind(b"text_completion") < got.rfind(b"ok")


def test_keys_are_asked_for(engine_of_tests):
    with serving(engine_of_tests, keys=frozenset({"secret", "other"})) as served:
        assert served.client.completions.create(**TEXT, max_tokens=1).choices
        assert served.send("GET", "/health")[0] == 200
        for wrong in ({}, {"Authorization": "secret"}, {"Authorization": "Bearer secre"}, {"Authorization": "Bearer "}):
            for method, path, body in (("POST", "/v1/completions", TEXT), ("GET", "/metrics", None)):
                status, answer = served.send(method, path, body, **wrong)
                assert (status, json.loads(answer)["error"]["type"]) == (401, "authentication_error")
        assert served.send("GET", "/v1/models", None, Authorization="Bearer other")[0] == 200


def test_without_keys_only_names_of_this_machine_are_answered(served):
    assert served.send("GET", "/v1/models", None, Host="localhost:80")[0] == 200
    for name in ("[::1]:80", "[::1]", "127.0.0.1"):
        assert served.send("GET", "/v1/models", None, Host=name)[0] == 200
    for name in ("evil.example", "127.0.0.1.evil.example", "testserver", ""):
        status, answer = served.send("GET", "/v1/models", None, Host=f"{name}:80")
        assert status == 403
        assert f"{name!r} is no name of this machine".encode() in answer


def test_an_answer_that_nobody_reads_is_given_up(served, monkeypatch):
    monkeypatch.setattr(limits, "HEAD_SECONDS", 0.05)
    asked = (GET.replace(b"/health", b"/") + b"\r\n") * 4000  # 30 MB of answers, more than sockets hold
    length = len(served.send("GET", "/")[1])
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.settimeout(10)
        with contextlib.suppress(OSError):
            connection.sendall(asked)
            time.sleep(2)
        got = 0
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(1 << 20):
                got += len(part)
    assert got < 4000 * length
    with served.asked("GET", "/") as answer:  # one that is read slowly comes whole
        assert sum(len(answer.read(length // 20)) for _ in range(21) if time.sleep(0.03) is None) == length


def test_the_queue_is_bounded(engine_of_tests):
    with serving(engine_of_tests, sequences=1, waiting=1) as served:
        asked = TEXT | {"max_tokens": 100, "ignore_eos": True, "stream": True}
        streams = [
            served.client.completions.create(**TEXT, max_tokens=100, stream=True, extra_body={"ignore_eos": True})
        ]
        with served.session.changed:
            served.session.queue.append(waiting := served.session.batch.jobs[0])
        status, answer = served.send("POST", "/v1/completions", asked)
        assert status == 429
        assert json.loads(answer)["error"]["type"] == "rate_limit_error"
        with served.session.changed:
            served.session.queue.remove(waiting)
        streams[0].close()


def test_the_log_has_no_prompt(served, caplog):
    caplog.set_level("INFO", "lowbit.serve")
    served.client.completions.create(model="tiny", prompt="confidential", max_tokens=3)
    served.send("POST", "/v1/completions", TEXT | {"prompt": ["confidential", 5]})
    assert "12 tokens read (0 of them cached), 3 written: length" in caplog.text
    assert "confidential" not in caplog.text


def test_an_error_of_ours_is_one(served, monkeypatch, caplog):
    monkeypatch.setattr(served.model.decoder, "layers", lambda step, cache: 1 / 0)
    for stream in (False, True):
        status, answer = served.send("POST", "/v1/completions", TEXT | {"stream": stream})
        assert status == 500
        assert json.loads(answer)["error"]["type"] == "server_error"
    monkeypatch.undo()
    monkeypatch.setattr("lowbit.serve.app.text_work", lambda server, body: 1 / 0)
    assert served.send("POST", "/v1/completions", TEXT)[0] == 500


def test_keys_and_addresses(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# mine\nabc  # the first\n\ndef\n")
    assert read_keys(file, "x, y") == {"abc", "def", "x", "y"}
    file.write_text("# nothing\n")
    with pytest.raises(UsageError, match="no API key"):
        read_keys(file, None)
    with pytest.raises(UsageError, match="cannot be read"):
        read_keys(tmp_path / "none", None)
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(UsageError, match="can be reached from other machines"):
            require_guard(host, ())
        require_guard(host, {"key"})
    for host in ("127.0.0.1", "localhost", "::1"):
        require_guard(host, ())
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(UsageError, match=r"cannot listen on .* in use"):
            listen("127.0.0.1", taken.getsockname()[1])
