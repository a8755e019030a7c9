"""Say what a photo shows and why, from an ONNX export: `python examples/onnx_cam.py EXPORT_DIR PHOTO OUT.png`."""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import onnxruntime

folder, photo_path, out_path = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
manifest = json.loads((folder / "manifest.json").read_text())
session = onnxruntime.InferenceSession(folder / manifest["graphs"][0]["file"])

photo = cv2.imread(photo_path)  # uint8 (height, width, 3), BGR
spec = manifest["preprocess"]
if spec["letterbox"] or spec["window"] or spec["window_auto"]:
    sys.exit("this example resizes, crops and scales photos, and nothing else")
height, width = spec["crop_px"]
shorter, (rows, columns) = spec["resize_px"], photo.shape[:2]
scale = shorter / min(rows, columns) if isinstance(shorter, int) else None
size = tuple(shorter[::-1]) if scale is None else (round(columns * scale), round(rows * scale))
resized = cv2.resize(photo, size, interpolation=cv2.INTER_AREA)
top, left = (resized.shape[0] - height) // 2, (resized.shape[1] - width) // 2
crop = resized[top : top + height, left : left + width]

# To gray, RGB or RGBA, as the network has 1, 3 or 4 channels.
colors = {1: cv2.COLOR_BGR2GRAY, 3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGR2RGBA}[len(spec["mean"])]
pixels = cv2.cvtColor(crop, colors).reshape(height, width, -1)
if spec["channel_order"] == "bgr":
    pixels[..., :3] = crop
values = np.float32((pixels / 255 * spec["scale"] - spec["mean"]) / spec["std"])
given = pixels if manifest["input"] == "uint8" else values
image = np.ascontiguousarray(given.transpose(2, 0, 1)[None])  # (1, channels, height, width)
class_index = np.full((1, manifest["classes"] or 1), -1)  # the most probable class, and those after it
logits, class_id, cam = session.run(["logits", "class_id", "cam"], {"image": image, "class_index": class_index})

probability = np.exp(logits[0] - np.logaddexp.reduce(logits[0]))
if manifest["task"] not in {None, "classification"}:  # binary and multi-label: each class by itself
    probability = np.exp(-np.logaddexp(0, -logits[0]))
heat = cv2.applyColorMap(np.uint8(255 * cv2.resize(cam[0, 0], (width, height))), cv2.COLORMAP_TURBO)
cv2.imwrite(out_path, cv2.addWeighted(crop, 0.5, heat, 0.5, 0))
winner = int(class_id[0, 0])
print(manifest["labels"][winner] if manifest["labels"] else winner, f"{probability[winner]:.1%}")
