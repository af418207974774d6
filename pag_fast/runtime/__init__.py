"""One life of a call: whose forward it is, what is put on the model, what is combined."""

from __future__ import annotations
