"""Dirty bitmaps in qcow2 files, version 3: read by QEMU's tools, and theirs by us.

file         what a file has to be able to do
header       the header: the one sector that decides what is in the file
bitmaps      bitmap directory, bitmap tables, bits
clusters     which clusters are in use
counts       their reference counts
contents     reading a file, checked in all its parts
container    changing one, so that a crash at any write loses nothing
"""
