/* FUSE: what is executed without the server, and what is answered. */

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <string.h>
#include <unistd.h>

#include "lhb_fuse.h"
#include "lhb_util.h"
#include "lhb_volume.h"

#define STATUS_PAIRS 64

static void
finish (struct lhb_fuse_slot *slot, int error, const void *payload,
        size_t payload_bytes)
{
  struct lhb_fuse *fuse = slot->lane->fuse;
  struct lhb_fuse_file *file = slot->file;

  slot->file = NULL;
  /* Before the answer: whoever has it may close the file. */
  lhb_fuse_put_file (fuse, file);
  lhb_fuse_reply (slot, error, payload, payload_bytes);
}

static void
start (struct lhb_fuse_slot *slot, uint32_t op, uint32_t flags,
       uint64_t offset_bytes, uint64_t length_bytes,
       void (*complete) (struct lhb_request *request))
{
  struct lhb_request *request = &slot->request;

  memset (request, 0, sizeof *request);
  request->volume = slot->volume;
  request->queue = slot->lane->queue;
  request->op = op;
  request->flags = flags | (slot->file->flags & LHB_FUSE_FUA
                            && (op == LHB_OP_WRITE || op == LHB_OP_TRIM
                                || op == LHB_OP_ZERO)
                        ? LHB_IO_FUA
                        : 0);
  request->offset_bytes = offset_bytes;
  request->length_bytes = length_bytes;
  request->buffer = slot->data;
  if (op != LHB_OP_READ
      && lhb_request_is_partial (offset_bytes, length_bytes))
    request->edges = slot->data + LHB_FUSE_BYTES_MAX + LHB_BLOCK_BYTES;
  request->complete = complete;
  lhb_request_start (request);
}

/* ---- READ, WRITE, FSYNC. */

static void
read_done (struct lhb_request *request)
{
  struct lhb_fuse_slot *slot
      = lhb_container_of (request, struct lhb_fuse_slot, request);

  finish (slot, request->error,
          slot->data + request->offset_bytes % LHB_BLOCK_BYTES,
          request->length_bytes);
}

static void
execute_read (struct lhb_fuse_slot *slot)
{
  uint64_t size = atomic_load (&slot->volume->size_bytes);
  uint64_t offset = slot->read.offset, length = slot->read.size;

  if (length > LHB_FUSE_BYTES_MAX)
    finish (slot, -EINVAL, NULL, 0);
  else if (offset >= size || length == 0)
    finish (slot, 0, NULL, 0);
  else
    start (slot, LHB_OP_READ, 0, offset,
           length < size - offset ? length : size - offset, read_done);
}

static void
write_done (struct lhb_request *request)
{
  struct lhb_fuse_slot *slot
      = lhb_container_of (request, struct lhb_fuse_slot, request);
  struct fuse_write_out out = { .size = (uint32_t) request->length_bytes };

  finish (slot, request->error, &out, sizeof out);
}

static void
execute_write (struct lhb_fuse_slot *slot)
{
  uint64_t size = atomic_load (&slot->volume->size_bytes);
  uint64_t offset = slot->write.offset, length = slot->write.size;
  struct fuse_write_out nothing = { 0 };

  if (length > LHB_FUSE_BYTES_MAX
      || slot->message_bytes != LHB_FUSE_HEAD_BYTES + length)
    finish (slot, -EINVAL, NULL, 0);
  else if (offset >= size)
    finish (slot, -ENOSPC, NULL, 0);
  else if (length == 0)
    finish (slot, 0, &nothing, sizeof nothing);
  else
    {
      if (offset % LHB_BLOCK_BYTES != 0)
        memmove (slot->data + offset % LHB_BLOCK_BYTES, slot->data, length);
      start (slot, LHB_OP_WRITE, 0, offset,
             length < size - offset ? length : size - offset, write_done);
    }
}

static void
change_done (struct lhb_request *request)
{
  finish (lhb_container_of (request, struct lhb_fuse_slot, request),
          request->error, NULL, 0);
}

static void
execute_fsync (struct lhb_fuse_slot *slot)
{
  if (slot->volume->flags & LHB_VOLUME_READ_ONLY)
    finish (slot, 0, NULL, 0);
  else
    start (slot, LHB_OP_FLUSH, 0, 0, 0, change_done);
}

/* ---- FALLOCATE. */

/* A hole that is not made of whole blocks has zeros at its ends, which a TRIM
 * does not promise. */
static void
execute_fallocate (struct lhb_fuse_slot *slot)
{
  uint64_t size = atomic_load (&slot->volume->size_bytes);
  uint64_t offset = slot->fallocate.offset, length = slot->fallocate.length;
  uint32_t mode = slot->fallocate.mode;
  bool keeps_size = mode & FALLOC_FL_KEEP_SIZE;
  bool zeroes = (mode & ~(uint32_t) FALLOC_FL_KEEP_SIZE)
                == FALLOC_FL_ZERO_RANGE;

  if (!zeroes && mode != (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE))
    finish (slot, -EOPNOTSUPP, NULL, 0);
  else if (length == 0 || offset > INT64_MAX || length > INT64_MAX - offset)
    finish (slot, -EINVAL, NULL, 0);
  else if (!keeps_size && offset + length > size)
    finish (slot, -EFBIG, NULL, 0);
  else if (offset >= size)
    finish (slot, 0, NULL, 0);
  else
    {
      length = length < size - offset ? length : size - offset;
      if (zeroes)
        start (slot, LHB_OP_ZERO, LHB_IO_NO_HOLE, offset, length, change_done);
      else if (lhb_request_is_partial (offset, length))
        start (slot, LHB_OP_ZERO, 0, offset, length, change_done);
      else
        start (slot, LHB_OP_TRIM, 0, offset, length, change_done);
    }
}

/* ---- LSEEK. */

/* In a worker: look through the range that is claimed. */
static void
probe_seek (struct lhb_request *request)
{
  struct lhb_fuse_slot *slot
      = lhb_container_of (request, struct lhb_fuse_slot, request);
  uint64_t at = request->offset_bytes, end = at + request->length_bytes;
  bool wants_hole = slot->whence == SEEK_HOLE;
  uint32_t pairs[2 * STATUS_PAIRS];

  while (at < end)
    {
      int count = lhb_volume_block_status (request->volume, at, end - at,
                                           pairs, STATUS_PAIRS);

      if (count <= 0)
        {
          request->error = count < 0 ? count : -EIO;
          return;
        }
      for (int i = 0; i < count; i++)
        {
          if ((pairs[2 * i + 1] != 0) == wants_hole)
            {
              slot->found = at;
              return;
            }
          at += pairs[2 * i];
        }
    }
}

static void seek_on (struct lhb_fuse_slot *slot, uint64_t offset_bytes);

static void
seek_done (struct lhb_request *request)
{
  struct lhb_fuse_slot *slot
      = lhb_container_of (request, struct lhb_fuse_slot, request);
  struct fuse_lseek_out out = { .offset = slot->found };

  if (request->error == 0 && slot->found == UINT64_MAX)
    seek_on (slot, request->offset_bytes + request->length_bytes);
  else
    finish (slot, request->error, &out, sizeof out);
}

static void
seek_on (struct lhb_fuse_slot *slot, uint64_t offset_bytes)
{
  uint64_t size = atomic_load (&slot->volume->size_bytes);
  uint64_t left = offset_bytes < size ? size - offset_bytes : 0;
  struct fuse_lseek_out out = { .offset = size };
  struct lhb_request *request = &slot->request;

  if (left == 0)
    {
      bool is_end = slot->whence == SEEK_HOLE && slot->lseek.offset < size;

      finish (slot, is_end ? 0 : -ENXIO, &out, sizeof out);
      return;
    }
  memset (request, 0, sizeof *request);
  request->volume = slot->volume;
  request->queue = slot->lane->queue;
  request->op = LHB_OP_PROBE;
  request->offset_bytes = offset_bytes;
  request->length_bytes = left < LHB_FUSE_SEEK_BYTES ? left
                                                     : LHB_FUSE_SEEK_BYTES;
  request->probe = probe_seek;
  request->complete = seek_done;
  lhb_request_start (request);
}

static void
execute_lseek (struct lhb_fuse_slot *slot)
{
  slot->whence = slot->lseek.whence;
  slot->found = UINT64_MAX;
  if (slot->whence != SEEK_DATA && slot->whence != SEEK_HOLE)
    finish (slot, -EINVAL, NULL, 0);
  else
    seek_on (slot, slot->lseek.offset);
}

/* ---- All. */

struct operation {
  void (*execute) (struct lhb_fuse_slot *slot);
  size_t handle_at;
  size_t bytes;                 /* of the message, at least */
  int unknown;                  /* a file that was not added; 0: the server's */
  bool changes;
};

#define MESSAGE(type) (sizeof (struct fuse_in_header) + sizeof (struct type))

/* ENOSYS for a file of the server's would switch FALLOCATE and LSEEK off for
 * all files of the mount. */
static const struct operation operations[] = {
  [FUSE_READ] = { execute_read, offsetof (struct fuse_read_in, fh),
                  MESSAGE (fuse_read_in), 0, false },
  [FUSE_WRITE] = { execute_write, offsetof (struct fuse_write_in, fh),
                   MESSAGE (fuse_write_in), -EBADF, true },
  [FUSE_FSYNC] = { execute_fsync, offsetof (struct fuse_fsync_in, fh),
                   MESSAGE (fuse_fsync_in), 0, false },
  [FUSE_FALLOCATE] = { execute_fallocate,
                       offsetof (struct fuse_fallocate_in, fh),
                       MESSAGE (fuse_fallocate_in), -EOPNOTSUPP, true },
  [FUSE_LSEEK] = { execute_lseek, offsetof (struct fuse_lseek_in, fh),
                   MESSAGE (fuse_lseek_in), -EOPNOTSUPP, false },
};

bool
lhb_fuse_execute (struct lhb_fuse_slot *slot)
{
  const struct operation *operation = &operations[0];
  uint64_t handle;

  if (slot->opcode < sizeof operations / sizeof operations[0])
    operation = &operations[slot->opcode];
  if (operation->execute == NULL)
    return false;
  if (slot->message_bytes < operation->bytes)
    {
      lhb_fuse_reply (slot, -EINVAL, NULL, 0);
      return true;
    }
  memcpy (&handle,
          slot->head + sizeof (struct fuse_in_header) + operation->handle_at,
          sizeof handle);
  slot->file = lhb_fuse_take_file (slot->lane->fuse, handle, &slot->volume);
  if (slot->file == NULL && operation->unknown == 0)
    return false;
  if (slot->file == NULL)
    lhb_fuse_reply (slot, operation->unknown, NULL, 0);
  else if (slot->volume == NULL)
    finish (slot, -EIO, NULL, 0);
  else if (operation->changes && !(slot->file->flags & LHB_FUSE_WRITABLE))
    finish (slot, -EROFS, NULL, 0);
  else
    operation->execute (slot);
  return true;
}
