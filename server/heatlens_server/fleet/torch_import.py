"""One thread at a time imports torch and what needs it.

Models are loaded side by side, and a model's torch engine when a request first needs it. Where two threads import
packages whose modules import each other, as torchvision's do, Python may show one of them half a module.
"""

import threading

importing_torch = threading.RLock()
"""To be held around every import, in the code of a function, of something that imports torch."""
