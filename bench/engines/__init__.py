"""Other engines, each a layer that bench/peers.py measures beside ktk's: one file an engine.

llama_cpp.py starts a program for each turn. Those that are Python packages run in the Python they
are installed in: driven.py starts their drive_NAME.py there and speaks with it, driver.py is what
those files share. Drivers need torch and their engine, not ktk.
"""
