"""A chat endpoint for the tests of recaption.py: it answers after a while, and a share of its answers is faulty.

    python tests/faulty_endpoint.py --delay 0.05 --faults 0.2 --log requests.txt       prints its port

Its caption says which picture and which prompt it was asked about. Each question about a picture is a line of --log.
"""
import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import random
import re

FAULTS = ("429", "500", "drop", "garbage", "empty", "refusal")


def caption(url, prompt):
    """What the endpoint says about the picture with this data URL."""
    digest = hashlib.md5(url.encode()).hexdigest()[:12]
    name = digest.translate(str.maketrans("0123456789", "ghijklmnop"))
    return f"A thing called {name}, asked about in {len(prompt)} letters."


class Endpoint:
    def __init__(self, options):
        self.options, self.pictures = options, 0
        self.log = options.log and open(options.log, "a")

    async def serve(self, reader, writer):
        """One connection: its requests, one after the other."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = re.search(r"content-length: (\d+)", head)
                body = await reader.readexactly(int(length[1]) if length else 0)
                status, answer = await self.answer(head, body)
                if status is None:
                    break
                headers = f"Content-Type: application/json\r\nRetry-After: 0.1\r\nContent-Length: {len(answer)}"
                writer.write(f"HTTP/1.1 {status}\r\n{headers}\r\n\r\n{answer}".encode())
        writer.close()

    async def answer(self, head, body):
        """A request -> status (None: the connection drops), body."""
        o = self.options
        if "/models " in head:
            return "200 OK", json.dumps({"data": [{"id": name} for name in o.models.split(",")]})
        if o.status or o.key.lower() not in head:
            message = json.dumps({"error": {"message": f"told to say {o.status}: {head}"}})
            return o.status or "401 Unauthorized", message
        image, question = json.loads(body)["messages"][0]["content"]
        text = caption(image["image_url"]["url"], question["text"])
        fault = "" if question["text"] == "What colour is this?" else self.fault(text)
        await asyncio.sleep(o.delay)
        if fault == "garbage":
            return "200 OK", "certainly not JSON"
        text = {"empty": "", "refusal": "I'm sorry, but I can't help with that."}.get(fault, text)
        answer = json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})
        status = {"429": "429 Too Many Requests", "500": "500 Broken", "drop": None}
        return status.get(fault, "200 OK"), answer

    def fault(self, text):
        """What is wrong with the answer to this question about a picture, or "" for nothing."""
        o = self.options
        if self.log:
            print(text, file=self.log, flush=True)
        self.pictures += 1
        if self.pictures == o.dies_after:
            os._exit(0)
        return random.choice(FAULTS) if random.random() < o.faults else ""


async def main():
    p = argparse.ArgumentParser()
    p.add_argument("--delay", type=float, default=0.0)
    p.add_argument("--faults", type=float, default=0.0)
    p.add_argument("--status", help="say this to every question, such as '404 Not Found'")
    p.add_argument("--dies-after", type=int, default=0, help="questions about pictures")
    p.add_argument("--key", default="")
    p.add_argument("--models", default="tiny")
    p.add_argument("--log")
    endpoint = Endpoint(p.parse_args())
    server = await asyncio.start_server(endpoint.serve, "127.0.0.1", 0, limit=1 << 22)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
