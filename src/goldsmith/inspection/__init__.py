"""Inspection: what can be checked before a second is spent on training. So far: `verify`, the fast path against a plain one."""
