import io

import numpy as np
from PIL import Image

from jitexport.png import encode_png


def test_png_holds_every_pixel():
    pixels = np.random.default_rng(0).integers(0, 256, (17, 9, 3), dtype=np.uint8)
    assert (np.array(Image.open(io.BytesIO(encode_png(Image.fromarray(pixels))))) == pixels).all()
