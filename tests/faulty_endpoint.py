"""A chat endpoint for the tests of recaption.py: it answers after a while, and a share of its answers is faulty.

    python tests/faulty_endpoint.py --delay 0.05 --faults 0.2 --log requests.jsonl       prints its port

Its caption says which picture and which prompt it was asked about. GET /stats: {"requests", "most_at_once", "faults"}.
"""
import argparse
import asyncio
import hashlib
import json
import os
import random
import time
from collections import Counter

FAULTS = ("429", "429 with a date", "500", "503", "drop", "truncated", "garbage", "not http", "silence", "empty",
          "refusal")


def caption(url: str, prompt: str) -> str:
    """What the endpoint says about the picture with this data URL."""
    picture = "".join(" abcdefghijklmnop"[1 + int(digit, 16)] for digit in hashlib.md5(url.encode()).hexdigest()[:12])
    return f"A thing called {picture}, asked about in {len(prompt)} letters."


class Server(asyncio.Protocol):
    options, stats, log = None, Counter(), None

    def connection_made(self, transport):
        self.transport, self.buffer, self.wanted = transport, bytearray(), None

    def connection_lost(self, error):
        self.transport = None

    def data_received(self, data):
        self.buffer += data
        if self.wanted is None:
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = self.buffer[:end].decode().lower()
            self.get = head.split()[0] == "get" and head.split()[1]
            self.wanted = end + 4 + int(head.partition("content-length:")[2].split("\r\n")[0] or 0)
            self.start, self.auth = end + 4, head.partition("authorization:")[2].split("\r\n")[0].strip()
        if len(self.buffer) >= self.wanted:
            body, self.buffer, self.wanted = bytes(self.buffer[self.start:self.wanted]), bytearray(), None
            self.asked(body)

    def asked(self, body):
        o = self.options
        if self.get:
            models = {"data": [{"id": name} for name in o.models.split(",")]}
            table = dict(self.stats) if self.get.endswith("stats") else models
            return self.send(json.dumps(table))
        if o.status:
            return self.send(json.dumps({"error": {"message": f"told to say {o.status} to {self.auth}"}}), o.status)
        if o.key and self.auth != f"bearer {o.key.lower()}":
            return self.send('{"error": "bad key"}', "401 Unauthorized")
        content = json.loads(body)["messages"][0]["content"]
        url, prompt = content[0].get("image_url", {}).get("url", ""), content[-1]["text"]
        self.stats["requests"] += 1
        self.stats["now"] += 1
        self.stats["most_at_once"] = max(self.stats["most_at_once"], self.stats["now"])
        text, fault = caption(url, prompt), ""
        if url and random.random() < o.faults:
            fault = random.choice(FAULTS)
            self.stats[fault] += 1
        if url and time.monotonic() < o.ready:
            fault = "busy"
        o.ready = o.ready if o.ready or not url else time.monotonic() + o.busy
        if self.log:
            self.log.write(json.dumps({"text": text, "fault": fault, "time": time.monotonic()}) + "\n")
            self.log.flush()
        if self.stats["requests"] == o.dies_after:
            os._exit(0)
        tokens = 10 if o.blind or not url else 200
        asyncio.get_running_loop().call_later(o.delay, self.answer, text, fault, tokens)

    def answer(self, text, fault, tokens):
        self.stats["now"] -= 1
        text = {"empty": "", "refusal": "I'm sorry, but I can't help with that."}.get(fault, text)
        body = json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}],
                           "usage": {"prompt_tokens": tokens, "completion_tokens": 12}})
        if fault == "429":
            self.send("{}", "429 Too Many Requests", "Retry-After: 0.1\r\n")
        elif fault == "busy":
            self.send("{}", "429 Too Many Requests", f"Retry-After: {self.options.busy}\r\n")
        elif fault == "429 with a date":
            self.send("{}", "429 Too Many Requests", "Retry-After: Sun, 06 Nov 1994 08:49:37 GMT\r\n")
        elif fault in ("500", "503"):
            self.send('{"error": "broken"}', f"{fault} Broken")
        elif fault == "garbage":
            self.send("<html>certainly not JSON")
        elif fault == "truncated":
            self.send(body, cut=20)
        elif fault == "not http":
            self.write(b"\x00\x01\x02\xff\r\n\r\n")
        elif fault == "drop" and self.transport:
            self.transport.close()
        elif fault != "silence":
            self.send(body)

    def send(self, body, status="200 OK", headers="", cut=0):
        body = body.encode()
        head = f"HTTP/1.1 {status}\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
        self.write(head.encode() + body[:len(body) - cut])
        if cut and self.transport:
            self.transport.close()

    def write(self, data):
        if self.transport:
            self.transport.write(data)


async def main():
    p = argparse.ArgumentParser()
    p.add_argument("--delay", type=float, default=0.0)
    p.add_argument("--faults", type=float, default=0.0)
    p.add_argument("--status", help="say this to every question, such as '404 Not Found'")
    p.add_argument("--blind", action="store_true", help="a model that takes no notice of pictures")
    p.add_argument("--busy", type=float, default=0.0,
                   help="for so many seconds from the first picture on, say 429 with Retry-After")
    p.add_argument("--dies-after", type=int, default=0, help="questions")
    p.add_argument("--key")
    p.add_argument("--models", default="tiny")
    p.add_argument("--log")
    Server.options = p.parse_args()
    Server.options.ready = 0
    Server.log = Server.options.log and open(Server.options.log, "a")
    server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
