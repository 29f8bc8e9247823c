"""Dirty bitmaps that survive: of each disk, and what can be done to them.

containers   the qcow2 files they are saved in, open and locked
disk         the bitmaps of one disk: loaded, saved, given up
steps        what can be done to them, several at one instant
mount        those of all disks; saving in the background
"""
