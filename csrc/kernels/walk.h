// How a launch walks a tensor: the one view that all scopes and layouts share. Plain numbers, filled by plan.h on the host.
//
// x is a number of matrices (outers) of rows x cols; elements of a row are contiguous. A set is all rows of ``width`` neighbouring
// columns of one matrix:
//
//   scope, layout        outers  rows  cols   width  channels run along   sets
//   channel       nchw   C       N     S      S      (one per matrix)     wide    rows
//   sample_group  nchw   N*G     C/G   S      S      rows                 wide    rows
//   position      nhwc   N*S     1     C      C      columns              wide    columns
//   channel       nhwc   1       N*S   C      1      columns              narrow  columns
//   sample_group  nhwc   N       S     C      C/G    columns              narrow  columns
//   position      nchw   N       C     S      1      rows                 narrow  rows
//
// Wide: a set is a whole matrix, and its elements are summed over lanes and threads alike. Narrow: the lanes of a vector may belong
// to different sets, and every lane has sums of its own.
#pragma once

#include <cstdint>

namespace normfused {

struct Walk {
    // the tensor; matrix o starts at (o / period)*high_stride + (o % period)*low_stride, with channel (o % period)*low_channels
    int64_t outers, period, high_stride, low_stride;
    int64_t rows, row_stride, cols, elements;
    int row_vectors;  // vectors that a row may touch; one more than it fills where rows start off a 16-byte boundary
    int mask_shift;  // the mask's strips (slab.cuh): of 64 bytes of narrow sets, so that a slice has them whole; of wide ones whole rows
    int64_t low_channels, row_channels;  // channel of (o, row, column) where channels run along rows: base + row*row_channels
    int64_t width, sets_per_outer;  // set of (o, column) = o*sets_per_outer + column / width; wide: o
    uint64_t width_inverse;  // 2^40 / width, rounded up: column / width = column*width_inverse >> 40 while C < 2^20
    // the cut: a block's slab is ``slice`` columns x ``chunk_rows`` rows (wide: x chunk_vectors vectors) of a matrix
    int64_t slice, slices;  // narrow; a multiple of the vector and of width
    int64_t chunks;  // = row chunks * vector_chunks
    int chunk_rows, chunk_vectors, vector_chunks;
    // narrow, of batch-instance norm, whose teams keep to a sample each: samples of a slab, or pieces that one of them is cut into, each
    // with ``teams`` teams. Else there is one, of all rows, cut into all chunks. Wide rows are samples anyway: a team has one of them
    int samples, pieces;
    int64_t sample_rows;
    int per_row, steps;  // vectors that a thread meets in a row and in all rows of a slab
    int64_t units;  // slabs of the launch, all chunks counted
    bool chunks_adjoin;  // neighbouring units are chunks of the same sets, which exchange; else slices, which share lines of memory
    // threads: ``teams`` teams of ``team`` threads; a team takes a row, a thread every team-th vector of it
    int team, teams;
    bool folds;  // narrow: teams are a power of two below 32, and those of a warp merge their sums by shuffles

    // rows of a narrow slab's table of values per column, before they are merged: those of one sample, where teams keep to theirs
    constexpr int rows_of_sample() const { return folds ? (team * teams + 31) / 32 : teams; }
    int sets_per_block;  // wide: several small sets to a block, each with team*teams threads (then at most 32)
    // the batches of vectors that stay on chip between the two passes over a slab, at the end of the walk; the last in registers
    int resident, spare;  // places in shared memory for them, and beyond them for batches of the next slab
    uint32_t phase_mask;  // V - 1 where rows may start inside a 16-byte vector and are walked by the vectors of memory, else 0
    int row_key;       // where channels run along rows: row & row_key changes where the channel does
    bool one_channel;  // wide along rows: all rows of a matrix are of one channel
    bool regular;  // rows are whole vectors, so that a thread has all lanes of a vector or none
    bool aligned;  // every tensor starts at a 16-byte boundary, and (narrow) every row does
};

}  // namespace normfused
