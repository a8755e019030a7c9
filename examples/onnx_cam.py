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
height, width = spec["crop_px"]
shorter, (rows, columns) = spec["resize_px"], photo.shape[:2]
scale = shorter / min(rows, columns) if isinstance(shorter, int) else None
size = tuple(shorter[::-1]) if scale is None else (round(columns * scale), round(rows * scale))
resized = cv2.resize(photo, size, interpolation=cv2.INTER_AREA)
top, left = (resized.shape[0] - height) // 2, (resized.shape[1] - width) // 2
crop = resized[top : top + height, left : left + width]

values = (crop[..., ::-1] / 255 - spec["mean"]) / spec["std"]
image = np.ascontiguousarray(values.transpose(2, 0, 1)[None], dtype=np.float32)  # (1, 3, height, width)
class_index = np.full((1, 1), -1)  # the most probable class
logits, class_id, cam = session.run(["logits", "class_id", "cam"], {"image": image, "class_index": class_index})

probability = np.exp(logits[0] - logits[0].max())
probability /= probability.sum()
heat = cv2.applyColorMap(np.uint8(255 * cv2.resize(cam[0, 0], (width, height))), cv2.COLORMAP_TURBO)
cv2.imwrite(out_path, cv2.addWeighted(crop, 0.5, heat, 0.5, 0))
winner = int(class_id[0, 0])
print(manifest["labels"][winner] if manifest["labels"] else winner, f"{probability[winner]:.1%}")
