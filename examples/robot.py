"""A robot in 40 lines: asks a recorded question over MQTT, plays the reply into a WAV file."""

import asyncio
import json
import struct
import sys
import wave

import aiomqtt

HEADER = struct.Struct("<BBHIIi")  # version, flags, rate, sequence, sample clock, turn
ME = "spirit/robot"


async def speak(client: aiomqtt.Client, path: str) -> None:
    with wave.open(path) as recording:  # 16 kHz mono; as a microphone would, 20 ms at a time
        for n in range(recording.getnframes() // 320 + 1):
            head = HEADER.pack(1, n == 0, 16_000, n, n * 320, 0)
            await client.publish(f"{ME}/audio/in", head + recording.readframes(320))
            await asyncio.sleep(0.02)


async def main(host: str, port: str, question: str, reply: str) -> None:
    async with aiomqtt.Client(host, int(port)) as client:
        await client.subscribe([(f"{ME}/{t}", 1) for t in ("audio/out", "text/out", "event")])
        speaking = asyncio.create_task(speak(client, question))
        with wave.open(reply, "wb") as out:
            out.setparams((1, 2, 16_000, 0, "NONE", ""))
            async for message in client.messages:
                if message.topic.matches(f"{ME}/audio/out"):
                    out.writeframes(message.payload[HEADER.size :])
                    continue
                said = json.loads(message.payload)
                print(said.get("text") or said["type"])
                if said.get("type") in ("turn-ended", "busy"):
                    break
        await speaking


asyncio.run(main(*sys.argv[1:]))  # localhost 1883 examples/question.wav reply.wav
