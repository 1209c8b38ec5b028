"""A voice agent in one file, to be measured: it answers a tone a fixed time after speech has ended.

``python scripted_agent.py [--after MS] [--rate HZ] [--die-after SECONDS] [--deaf] [--at-once]``
"""

import argparse
import math
import struct
import sys

parser = argparse.ArgumentParser()
parser.add_argument("--after", type=int, default=200, help="ms of silence before the answer")
parser.add_argument("--rate", type=int, default=16_000, help="of the answer, Hz")
parser.add_argument("--die-after", type=float, default=math.inf, help="seconds of sound")
parser.add_argument("--deaf", action="store_true", help="never answers")
parser.add_argument("--at-once", action="store_true", help="answers as soon as speech begins")
given = parser.parse_args()

count = given.rate // 4
tone = [round(8000 * math.sin(2 * math.pi * 440 * n / given.rate)) for n in range(count)]
answer = struct.pack(f"<{count}h", *tone)
chunks, quiet, speaking = 0, 0, False
sys.stdout.buffer.write(struct.pack("<160h", *[0] * 160))  # it is ready
sys.stdout.flush()
while len(chunk := sys.stdin.buffer.read(640)) == 640:
    chunks += 1
    if chunks * 0.02 >= given.die_after:
        sys.exit("the model has run away")
    samples = struct.unpack("<320h", chunk)
    loud = math.sqrt(sum(s * s for s in samples) / 320) > 0.01 * 32768
    quiet = 0 if loud else quiet + 1
    begins, speaking = loud and not speaking, speaking or loud
    ends = speaking and quiet * 20 >= given.after
    if ends:
        speaking = False
    if not given.deaf and (begins if given.at_once else ends):
        sys.stdout.buffer.write(answer)
        sys.stdout.flush()
