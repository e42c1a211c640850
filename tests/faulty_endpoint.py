"""A chat endpoint for the tests of recaption.py: it answers after a while, and a share of its answers is faulty.

    python tests/faulty_endpoint.py --delay 0.05 --faults 0.2 --log requests.txt       prints its port

Its caption says which picture and which prompt it was asked about. Each question about a picture is a line of --log.
"""
import argparse
import hashlib
import itertools
import json
import os
import random
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def caption(url, prompt):
    """What the endpoint says about the picture with this data URL."""
    digest = hashlib.md5(url.encode()).hexdigest()[:12]
    name = digest.translate(str.maketrans("0123456789", "ghijklmnop"))
    return f"A thing called {name}, asked about in {len(prompt)} letters."


def reply(text):
    return json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})


FAULTS = [  # status (None: the connection drops), body
    (429, "too many requests"), (500, "broken"), (None, ""), (200, "certainly not JSON"), (200, reply("")),
    (200, reply("I'm sorry, but I can't help with that."))]


class Endpoint(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open
    wbufsize = -1  # an answer goes out in one piece
    pictures = itertools.count(1)

    def log_message(self, *_):
        """Nothing: what is of interest is in --log."""

    def do_GET(self):
        """The list of models."""
        models = [{"id": name} for name in self.options.models.split(",")]
        self.send(200, json.dumps({"data": models}))

    def do_POST(self):
        """A question about a picture."""
        o = self.options
        body = self.rfile.read(int(self.headers["Content-Length"]))
        key = self.headers["Authorization"]
        if o.status or o.key not in key:
            message = {"error": {"message": f"told to say {o.status}: {key}"}}
            self.send(o.status or 401, json.dumps(message))
            return
        image, question = json.loads(body)["messages"][0]["content"]
        text = caption(image["image_url"]["url"], question["text"])
        answer = 200, reply(text)
        if question["text"] != "What colour is this?":  # asked by the check at the start, which finds no fault
            print(text, file=o.log, flush=True)
            if next(self.pictures) == o.dies_after:
                os._exit(0)
            if random.random() < o.faults:
                answer = random.choice(FAULTS)
        time.sleep(o.delay)
        self.send(*answer)

    def send(self, status, text):
        if status is None:
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Retry-After", "0.1")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--delay", type=float, default=0.0)
    p.add_argument("--faults", type=float, default=0.0)
    p.add_argument("--status", type=int, help="say this to every question, such as 404")
    p.add_argument("--dies-after", type=int, default=0, help="questions about pictures")
    p.add_argument("--key", default="")
    p.add_argument("--models", default="tiny")
    p.add_argument("--log", default=os.devnull)
    Endpoint.options = p.parse_args()
    Endpoint.options.log = open(Endpoint.options.log, "a")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
