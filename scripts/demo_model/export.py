"""The demo model as a diffusers folder: weights in half precision, and the files that describe what it was taught."""

import json
import math
from pathlib import Path

import torch
from data import IMAGE_SIZE, PICTURES_PACKAGE, load_objects
from networks import Models, make_pipeline
from pictures import GUIDANCE
from PIL import Image
from shards import TEXT_TOKENS

from jitexport.evaluate.scenes import COLOURS, OBJECTS, held_out_colours

CAPTION = "{name} on a {colour} background"
REFERENCE_SIZE = 128  # pixels a side of an object in the reference atlas
REFERENCE_COLUMNS = 10


def write_folder(models: Models, folder: Path, data: Path) -> None:
    """Write the networks, and what describes them.

    Args:
        data: folder for the npm packages, of which the objects' pictures are taken.
    """
    pipeline = make_pipeline(models).to(torch.float16)
    pipeline.save_pretrained(folder)
    # transformers loads in the dtype that a configuration names, diffusers in single precision: they must agree.
    for name in ("text_encoder", "text_encoder_2"):
        path = folder / name / "config.json"
        write_json(json.loads(path.read_text(encoding="utf-8")) | {"dtype": "float32"}, path)

    defaults = {
        "height": IMAGE_SIZE,
        "width": IMAGE_SIZE,
        "max_sequence_length": TEXT_TOKENS,
        "guidance_scale": GUIDANCE,
        "num_inference_steps": 50,
    }
    write_json(defaults, folder / "jitexport.json")
    captions = {
        "caption": CAPTION.replace("{name}", "<name>").replace("{colour}", "<colour>"),
        "scenes": True,
        "names": OBJECTS,
        "colours": COLOURS,
        "held_out": list(held_out_colours().items()),
        "pictures": PICTURES_PACKAGE,
        "reference": {"file": "reference.png", "size": REFERENCE_SIZE, "columns": REFERENCE_COLUMNS},
    }
    write_json(captions, folder / "captions.json")
    reference_atlas(data).save(folder / "reference.png", optimize=True)
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)  # where --init happened to lie
        write_json(config, path)
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)  # the libraries write weights for their owner only


def reference_atlas(folder: Path) -> Image.Image:
    """All objects as one RGBA picture, row by row in the order of OBJECTS, for measuring quality without the data."""
    rows = math.ceil(len(OBJECTS) / REFERENCE_COLUMNS)
    atlas = Image.new("RGBA", (REFERENCE_COLUMNS * REFERENCE_SIZE, rows * REFERENCE_SIZE))
    for index, picture in enumerate(load_objects(folder).values()):
        row, column = divmod(index, REFERENCE_COLUMNS)
        # The mean of each 2 x 2 pixels, as pictures are made smaller when they are compared with this one.
        small = picture.resize((REFERENCE_SIZE, REFERENCE_SIZE), Image.Resampling.BOX)
        atlas.paste(small, (column * REFERENCE_SIZE, row * REFERENCE_SIZE))
    return atlas


def write_json(content: dict, path: Path) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
