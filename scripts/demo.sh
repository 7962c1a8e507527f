#!/usr/bin/env bash
# First light: install, build the demo model's 4x bundle, make a sheet of images, measure latencies. Ends in out/.
source "$(dirname "$0")/setup.sh" eval

mkdir -p out
jitexport build --model demo --speedup 4 --output engines/demo-4x --force
jitexport generate engines/demo-4x "red apple on a blue background" --output out/apple.png --seed 0
python scripts/demo_model/quality.py --bundle engines/demo-4x --prompts 12 --sheet out/demo-4x.png
jitexport profile engines/demo-4x --against diffusers,eager --repeats 3
echo "pictures: out/apple.png, out/demo-4x.png" >&2
