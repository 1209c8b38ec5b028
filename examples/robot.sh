#!/bin/sh
# A device without a line of Python: asks a typed question, shows what it is told, and writes the
# sound of the reply to stdout, as raw samples.
#
#     apt-get install mosquitto-clients
#     examples/robot.sh localhost 1883 'what is two plus three' | aplay -r 16000 -f S16_LE -c 1
set -eu
host=$1 port=$2 question=$3 me=spirit/shell-$$

# Packets come in hex, one a line: 32 digits of header, then the samples.
mosquitto_sub -W 15 -h "$host" -p "$port" -t "$me/audio/out" -F %x |
    while read -r packet; do printf %s "$packet" | cut -c33- | xxd -r -p; done &
mosquitto_sub -W 15 -h "$host" -p "$port" -q 1 -t "$me/text/out" -t "$me/event" >&2 &
sleep 1  # until both have subscribed
mosquitto_pub -h "$host" -p "$port" -q 1 -t "$me/text/in" -m "$question"
wait
