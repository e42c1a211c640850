"""A chat endpoint for the tests of recaption.py: it answers after a while, and a share of its answers is faulty.

    python tests/faulty_endpoint.py --delay 0.05 --faults 0.2 --log requests.txt       prints its port

Its caption says which picture and which prompt it was asked about. Each question about a picture is a line of --log.
"""
import argparse
import asyncio
import hashlib
import json
import os
import random
import time

FAULTS = ("429", "500", "drop", "garbage", "empty", "refusal")


def caption(url, prompt):
    """What the endpoint says about the picture with this data URL."""
    digest = hashlib.md5(url.encode()).hexdigest()[:12]
    name = digest.translate(str.maketrans("0123456789", "ghijklmnop"))
    return f"A thing called {name}, asked about in {len(prompt)} letters."


class Endpoint:
    def __init__(self, options):
        self.options, self.pictures, self.busy_until = options, 0, 0
        self.log = options.log and open(options.log, "a")

    async def serve(self, reader, writer):
        """One connection: its requests, one after the other."""
        try:
            while not writer.is_closing():
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.partition("content-length:")[2].split("\r\n")[0] or 0)
                status, headers, body = await self.answer(head, await reader.readexactly(length))
                if status is None:
                    return
                headers += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
                writer.write(f"HTTP/1.1 {status}\r\n{headers}{body}".encode())
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(self, head, body):
        """A request -> status (None: the connection drops), headers, body."""
        o, path = self.options, head.split()[1]
        if o.redirect and "moved" not in path:
            return "307 Temporary Redirect", f"Location: /moved{path}\r\n", ""
        if path.endswith("/models"):
            return "200 OK", "", json.dumps({"data": [{"id": name} for name in o.models.split(",")]})
        if o.status or o.key.lower() not in head:
            message = json.dumps({"error": {"message": f"told to say {o.status}: {head}"}})
            return o.status or "401 Unauthorized", "", message
        content = json.loads(body)["messages"][0]["content"]
        url = content[0]["image_url"]["url"]
        text = caption(url, content[-1]["text"])
        fault = "" if content[-1]["text"] == "What colour is this?" else self.fault(text)
        await asyncio.sleep(o.delay)
        if fault == "429":
            return "429 Too Many Requests", f"Retry-After: {o.busy or 0.1}\r\n", "{}"
        text = {"empty": "", "refusal": "I'm sorry, but I can't help with that."}.get(fault, text)
        body = json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})
        status = {"500": "500 Broken", "drop": None}.get(fault, "200 OK")
        return status, "", "certainly not JSON" if fault == "garbage" else body

    def fault(self, text):
        """What is wrong with the answer to this question about a picture, or "" for nothing."""
        o, now = self.options, time.monotonic()
        if self.log:
            print(now, text, file=self.log, flush=True)
        self.pictures += 1
        if self.pictures == o.dies_after:
            os._exit(0)
        self.busy_until = self.busy_until or now + o.busy
        if now < self.busy_until:
            return "429"
        return random.choice(FAULTS) if random.random() < o.faults else ""


async def main():
    p = argparse.ArgumentParser()
    p.add_argument("--delay", type=float, default=0.0)
    p.add_argument("--faults", type=float, default=0.0)
    p.add_argument("--status", help="say this to every question, such as '404 Not Found'")
    p.add_argument("--busy", type=float, default=0.0, help="say 429 with Retry-After for so many seconds")
    p.add_argument("--dies-after", type=int, default=0, help="questions about pictures")
    p.add_argument("--redirect", action="store_true", help="send every request elsewhere first")
    p.add_argument("--key", default="")
    p.add_argument("--models", default="tiny")
    p.add_argument("--log")
    endpoint = Endpoint(p.parse_args())
    server = await asyncio.start_server(endpoint.serve, "127.0.0.1", 0, limit=1 << 22)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
