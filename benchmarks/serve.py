"""A server under load: requests a second against the batch, with many clients at once, none of them lost.

python benchmarks/serve.py --workdir runs/miniature [--batches 1,8,40] [--clients 200] [--requests 600]
For each batch it starts `--mode=serve` as a process of its own on the loopback, sends drawn pictures by that many
clients, each of which sends its next request when the one before is answered, and ends it by SIGTERM. Each request is a
picture of another noise; greedy decoding. Clients and server share the machine.
"""

import argparse
import asyncio
import base64
import io
import json
import re
import signal
import statistics
import subprocess
import sys
import time

import numpy as np
from pairs import machine
from PIL import Image


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--arm", default="")
    parser.add_argument("--batches", default="1,8,40")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--requests", type=int, default=600)
    options = parser.parse_args()
    print(f"## A server under load: {options.clients} clients, {options.requests} requests\n")
    print(machine("jax", "flax", "uvicorn"))
    print(f"Command: {' '.join(['python', *sys.argv])}\n")
    print("| batch | requests a second | tokens a second | median s | 95 % s | lost |\n|---|---|---|---|---|---|")
    for batch in map(int, options.batches.split(",")):
        process, address, arm = start(options.workdir, options.arm, batch)
        try:
            bodies = [body(arm, number) for number in range(options.requests)]
            asyncio.run(send(address, bodies[: options.clients], options.clients))  # compiles what is not yet
            began = time.perf_counter()
            answers = asyncio.run(send(address, bodies, options.clients))
            took = time.perf_counter() - began
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        good = [(seconds, answer) for seconds, status, answer in answers if status == 200]
        tokens = sum(answer["usage"]["completion_tokens"] for _, answer in good)
        times = sorted(seconds for seconds, _ in good)
        print(
            f"| {batch} | {len(good) / took:.1f} | {tokens / took:.0f} | {statistics.median(times):.2f} | "
            f"{times[int(0.95 * (len(times) - 1))]:.2f} | {len(bodies) - len(good)} |",
            flush=True,
        )


def start(workdir: str, arm: str, batch: int) -> tuple[subprocess.Popen, tuple[str, int], str]:
    """Starts a server and waits until it listens: (process, address, an arm that it serves)."""
    command = [sys.executable, "-m", "eim_jax.main", "--mode=serve", f"--workdir={workdir}", "--port=0"]
    command += [f"--config.decode.batch={batch}", "--config.decode.methods=('greedy',)"]
    command += [f"--arm={arm}"] if arm else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"http://([\d.]+):(\d+) .*models: (\w+)", line):
            return process, (found[1], int(found[2])), found[3]
    raise SystemExit("the server ended before it listened")


def body(arm: str, number: int) -> bytes:
    """A request about a picture of its own."""
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((128, 128)).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}]
    return json.dumps({"model": arm, "messages": [{"role": "user", "content": content}]}).encode()


async def send(address: tuple[str, int], bodies: list[bytes], clients: int) -> list[tuple[float, int, dict]]:
    """Sends all, so many at a time: (seconds, status, answer) of each."""
    places = asyncio.Semaphore(clients)

    async def one(content: bytes) -> tuple[float, int, dict]:
        async with places:
            began = time.perf_counter()
            reader, writer = await asyncio.open_connection(*address)
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address[0]}\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Connection: close\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
            answer = await reader.read()
            writer.close()
            head, _, said = answer.partition(b"\r\n\r\n")
            return time.perf_counter() - began, int(head.split()[1]), json.loads(said)

    return await asyncio.gather(*map(one, bodies))


if __name__ == "__main__":
    main()
