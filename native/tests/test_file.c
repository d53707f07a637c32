/* Extents and checksums of image files of every shape. */
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "lhb_crc64.h"
#include "lhb_contract.h"
#include "lhb_test.h"

#define BLOCK LHB_BLOCK_BYTES
#define EXTENTS_MAX 4096

static struct lhb_extent extents[EXTENTS_MAX];

/* An unnamed file on a disk: /tmp is often a tmpfs, which has no FIEMAP. */
static int
make_file (uint64_t size_bytes)
{
  const char *directory = getenv ("TMPDIR");
  char path[4096];
  int fd;

  CHECK (snprintf (path, sizeof path, "%s/lhb-file-XXXXXX",
                   directory != NULL ? directory : "/var/tmp") > 0);
  fd = mkostemp (path, O_CLOEXEC);
  CHECK (fd >= 0);
  CHECK_EQUAL (unlink (path), 0);
  CHECK_EQUAL (ftruncate (fd, (off_t) size_bytes), 0);
  return fd;
}

static void
fill (unsigned char *bytes, size_t length_bytes, uint64_t seed)
{
  uint64_t state = seed * 2654435761u + 1;

  for (size_t i = 0; i < length_bytes; i++)
    {
      state = state * 6364136223846793005u + 1442695040888963407u;
      bytes[i] = (unsigned char) (state >> 56);
    }
}

static void
write_random (int fd, uint64_t offset_bytes, size_t length_bytes)
{
  void *bytes = NULL;

  CHECK_EQUAL (posix_memalign (&bytes, BLOCK, length_bytes), 0);
  fill (bytes, length_bytes, offset_bytes);
  CHECK_EQUAL (pwrite (fd, bytes, length_bytes, (off_t) offset_bytes),
               (ssize_t) length_bytes);
  free (bytes);
}

static void
check_extent (int index, uint64_t first_block, uint64_t blocks)
{
  CHECK_EQUAL (extents[index].offset_bytes, first_block * BLOCK);
  CHECK_EQUAL (extents[index].length_bytes, blocks * BLOCK);
}

static void
empty_and_all_hole_files_have_no_extents (void)
{
  int empty = make_file (0), hole = make_file (1ull << 40);

  CHECK_EQUAL (lhb_file_extents (empty, 0, extents, EXTENTS_MAX), 0);
  CHECK_EQUAL (lhb_file_extents (hole, 0, extents, EXTENTS_MAX), 0);
  close (empty);
  close (hole);
}

/* Delayed allocation: nothing here is synced before it is asked for.  The tail
 * is 5 bytes into block 20, and a part of block 9 makes all of it data.
 */
static void
unsynced_data_is_rounded_to_blocks_and_joined (void)
{
  int fd = make_file (20 * BLOCK + 5);

  write_random (fd, 3 * BLOCK, BLOCK);
  write_random (fd, 4 * BLOCK, BLOCK);
  write_random (fd, 9 * BLOCK + 100, 1);
  write_random (fd, 20 * BLOCK + 4, 1);
  CHECK_EQUAL (lhb_file_extents (fd, 0, extents, EXTENTS_MAX), 3);
  check_extent (0, 3, 2);
  check_extent (1, 9, 1);
  check_extent (2, 20, 1);
  close (fd);
}

static void
unwritten_extents_are_data_up_to_the_end_of_the_file (void)
{
  int fd = make_file (16 * BLOCK);

  CHECK_EQUAL (fallocate (fd, 0, 2 * BLOCK, 3 * BLOCK), 0);
  CHECK_EQUAL (fallocate (fd, FALLOC_FL_KEEP_SIZE, 15 * BLOCK, 8 * BLOCK), 0);
  CHECK_EQUAL (lhb_file_extents (fd, 0, extents, EXTENTS_MAX), 2);
  check_extent (0, 2, 3);
  check_extent (1, 15, 1);
  close (fd);
}

/* Written and unwritten blocks alternate, so the file system reports some 2000
 * extents that touch each other, over several batches: for us they are one.
 */
static void
touching_extents_are_joined_over_batches (void)
{
  int fd = make_file (2000 * BLOCK);

  CHECK_EQUAL (fallocate (fd, 0, 0, 2000 * BLOCK), 0);
  for (uint64_t block = 0; block < 2000; block += 2)
    write_random (fd, block * BLOCK, BLOCK);
  CHECK_EQUAL (lhb_file_extents (fd, 0, extents, EXTENTS_MAX), 1);
  check_extent (0, 0, 2000);
  CHECK_EQUAL (lhb_file_extents (fd, 0, extents, 1), 1);
  check_extent (0, 0, 2000);
  close (fd);
}

/* 3000 extents are more than five batches and a remainder; 7 at a time leave a
 * remainder, too.
 */
static void
fragmented_file_is_the_same_at_once_and_in_pieces (void)
{
  int fd = make_file (3 * 3000 * BLOCK);
  uint64_t position = 0;
  uint64_t seen = 0;
  int count;

  for (uint64_t i = 0; i < 3000; i++)
    write_random (fd, (3 * i + 1) * BLOCK, BLOCK);
  CHECK_EQUAL (lhb_file_extents (fd, 0, extents, EXTENTS_MAX), 3000);
  for (int i = 0; i < 3000; i++)
    check_extent (i, 3 * (uint64_t) i + 1, 1);

  do
    {
      count = lhb_file_extents (fd, position, extents, 7);
      CHECK (count >= 0 && count <= 7);
      for (int i = 0; i < count; i++)
        check_extent (i, 3 * seen++ + 1, 1);
      if (count > 0)
        position = extents[count - 1].offset_bytes
                   + extents[count - 1].length_bytes;
    }
  while (count == 7);
  CHECK_EQUAL (seen, 3000);
  close (fd);
}

static void
answer_begins_with_the_block_of_the_offset (void)
{
  int fd = make_file (20 * BLOCK);

  write_random (fd, 2 * BLOCK, 10 * BLOCK);
  CHECK_EQUAL (lhb_file_extents (fd, 5 * BLOCK, extents, EXTENTS_MAX), 1);
  check_extent (0, 5, 7);
  CHECK_EQUAL (lhb_file_extents (fd, 5 * BLOCK + 17, extents, EXTENTS_MAX), 1);
  check_extent (0, 5, 7);
  CHECK_EQUAL (lhb_file_extents (fd, 12 * BLOCK, extents, EXTENTS_MAX), 0);
  CHECK_EQUAL (lhb_file_extents (fd, 99 * BLOCK, extents, EXTENTS_MAX), 0);
  close (fd);
}

static void
extents_refuse_what_they_can_not_do (void)
{
  int fd = make_file (BLOCK), memory = memfd_create ("x", MFD_CLOEXEC);
  int pipe_fds[2];

  CHECK_EQUAL (lhb_file_extents (fd, 0, extents, 0), -EINVAL);
  CHECK_EQUAL (lhb_file_extents (fd, UINT64_MAX, extents, 1), -EINVAL);
  CHECK_EQUAL (lhb_file_extents (-1, 0, extents, 1), -EBADF);
  CHECK_EQUAL (pipe (pipe_fds), 0);
  CHECK_EQUAL (lhb_file_extents (pipe_fds[0], 0, extents, 1), -EINVAL);
  CHECK_EQUAL (lhb_probe_fiemap (fd), 0);
  CHECK_EQUAL (ftruncate (memory, BLOCK), 0);
  CHECK (lhb_probe_fiemap (memory) < 0);
  CHECK_EQUAL (lhb_file_extents (memory, 0, extents, 1),
               lhb_probe_fiemap (memory));
  close (pipe_fds[0]);
  close (pipe_fds[1]);
  close (memory);
  close (fd);
}

static void
crc_has_the_check_value_and_can_be_continued (void)
{
  unsigned char bytes[100];

  CHECK_EQUAL (lhb_crc64 (0, "123456789", 9), 0xb90956c775a41001u);
  CHECK_EQUAL (lhb_crc64 (0, "", 0), 0);
  fill (bytes, sizeof bytes, 1);
  for (size_t cut = 0; cut <= sizeof bytes; cut++)
    CHECK_EQUAL (lhb_crc64 (lhb_crc64 (0, bytes, cut), bytes + cut,
                            sizeof bytes - cut),
                 lhb_crc64 (0, bytes, sizeof bytes));
}

static void
crc_of_zeros_is_that_of_zero_bytes (void)
{
  size_t length_max = (1u << 20) + 3;
  unsigned char *zeros = calloc (1, length_max);
  uint64_t start = 0x0123456789abcdef, huge = 0;

  CHECK (zeros != NULL);
  for (uint64_t length = 0; length < 70; length++)
    CHECK_EQUAL (lhb_crc64_zeros (start, length),
                 lhb_crc64 (start, zeros, length));
  CHECK_EQUAL (lhb_crc64_zeros (start, length_max),
               lhb_crc64 (start, zeros, length_max));
  /* 2^40 bytes at once, and as 2^20 steps. */
  for (int i = 0; i < 1 << 20; i++)
    huge = lhb_crc64_zeros (huge, 1 << 20);
  CHECK_EQUAL (lhb_crc64_zeros (0, 1ull << 40), huge);
  free (zeros);
}

/* A sparse file with data across the border of two reads, an unwritten part
 * and an odd tail; the same content without a hole.  6 MiB and 77 bytes.
 */
#define IMAGE_BYTES ((6u << 20) + 77)

static unsigned char *
make_image (int *fd_out, size_t size_bytes)
{
  unsigned char *content = calloc (1, size_bytes);
  ssize_t got;

  CHECK (content != NULL);
  *fd_out = make_file (size_bytes);
  write_random (*fd_out, 0, BLOCK);
  write_random (*fd_out, 8 * BLOCK, (2 << 20) + 3 * BLOCK);
  CHECK_EQUAL (fallocate (*fd_out, 0, 4 << 20, 5 * BLOCK), 0);
  write_random (*fd_out, 5 << 20, BLOCK);
  if (size_bytes % BLOCK != 0)
    write_random (*fd_out, size_bytes - 10, 10);
  got = pread (*fd_out, content, size_bytes, 0);
  CHECK_EQUAL (got, (ssize_t) size_bytes);
  return content;
}

static void
check_file_crc (int fd, const unsigned char *content, uint64_t offset_bytes,
                uint64_t length_bytes)
{
  uint64_t crc = 0x55, want = 0x55;

  want = lhb_crc64 (want, content + offset_bytes, length_bytes);
  CHECK_EQUAL (lhb_file_crc64 (fd, offset_bytes, length_bytes, &crc), 0);
  CHECK_EQUAL (crc, want);
}

static void
file_crc_equals_the_crc_of_its_bytes (void)
{
  unsigned char *content;
  int fd;

  content = make_image (&fd, IMAGE_BYTES);
  check_file_crc (fd, content, 0, IMAGE_BYTES);
  check_file_crc (fd, content, 0, 0);
  check_file_crc (fd, content, 100, 1);
  check_file_crc (fd, content, BLOCK - 1, 8 * BLOCK);
  check_file_crc (fd, content, 2 * BLOCK, 2 * BLOCK);
  check_file_crc (fd, content, 8 * BLOCK + 5, (1 << 20) + 9);
  check_file_crc (fd, content, (1 << 20) - 1, IMAGE_BYTES - (1 << 20) - 1);
  check_file_crc (fd, content, IMAGE_BYTES - 12, 12);
  free (content);
  close (fd);
}

static void
file_crc_of_holes_equals_explicit_zeros (void)
{
  unsigned char *content;
  uint64_t sparse_crc = 0, dense_crc = 0;
  int sparse, dense = make_file (0);

  content = make_image (&sparse, IMAGE_BYTES);
  CHECK_EQUAL (pwrite (dense, content, IMAGE_BYTES, 0), IMAGE_BYTES);
  CHECK_EQUAL (lhb_file_crc64 (sparse, 0, IMAGE_BYTES, &sparse_crc), 0);
  CHECK_EQUAL (lhb_file_crc64 (dense, 0, IMAGE_BYTES, &dense_crc), 0);
  CHECK_EQUAL (sparse_crc, dense_crc);
  free (content);
  close (sparse);
  close (dense);
}

/* More extents than one turn of the checksum takes. */
static void
file_crc_of_a_fragmented_file (void)
{
  size_t size_bytes = 2 * 1300 * BLOCK;
  unsigned char *content = malloc (size_bytes);
  int fd = make_file (size_bytes);

  CHECK (content != NULL);
  for (uint64_t i = 0; i < 1300; i++)
    write_random (fd, 2 * i * BLOCK, BLOCK);
  CHECK_EQUAL (pread (fd, content, size_bytes, 0), (ssize_t) size_bytes);
  check_file_crc (fd, content, 0, size_bytes);
  check_file_crc (fd, content, 7, size_bytes - 9);
  free (content);
  close (fd);
}

static void
file_crc_through_direct_io (void)
{
  unsigned char *content;
  char path[64];
  int fd, direct;

  content = make_image (&fd, IMAGE_BYTES / BLOCK * BLOCK);
  CHECK (snprintf (path, sizeof path, "/proc/self/fd/%d", fd) > 0);
  direct = open (path, O_RDONLY | O_DIRECT | O_CLOEXEC);
  CHECK (direct >= 0);
  check_file_crc (direct, content, 0, IMAGE_BYTES / BLOCK * BLOCK);
  check_file_crc (direct, content, 3, (2 << 20) + 1);
  free (content);
  close (direct);
  close (fd);
}

static void
file_crc_without_fiemap_reads_everything (void)
{
  unsigned char content[3 * BLOCK + 1] = { 0 };
  int fd = memfd_create ("x", MFD_CLOEXEC);

  fill (content + BLOCK, BLOCK, 9);
  CHECK_EQUAL (ftruncate (fd, sizeof content), 0);
  CHECK_EQUAL (pwrite (fd, content + BLOCK, BLOCK, BLOCK), BLOCK);
  check_file_crc (fd, content, 0, sizeof content);
  check_file_crc (fd, content, 1, sizeof content - 1);
  close (fd);
}

static void
file_crc_behind_the_end_counts_zeros (void)
{
  unsigned char content[BLOCK + 1000] = { 0 };
  int fd = make_file (100);

  write_random (fd, 0, 100);
  CHECK_EQUAL (pread (fd, content, 100, 0), 100);
  check_file_crc (fd, content, 0, sizeof content);
  check_file_crc (fd, content, 200, 1000);
  close (fd);
}

/* 8 TiB of hole: this test does not end if holes are read. */
static void
file_crc_of_a_huge_hole_is_free (void)
{
  uint64_t size_bytes = 1ull << 43, crc = 0;
  int fd = make_file (size_bytes);

  CHECK_EQUAL (lhb_file_crc64 (fd, 0, size_bytes, &crc), 0);
  CHECK_EQUAL (crc, lhb_crc64_zeros (0, size_bytes));
  close (fd);
}

static void
file_crc_failure_leaves_the_running_value (void)
{
  char path[64];
  uint64_t crc = 42;
  int fd = make_file (BLOCK), write_only;

  CHECK_EQUAL (lhb_file_crc64 (-1, 0, 1, &crc), -EBADF);
  CHECK_EQUAL (lhb_file_crc64 (fd, UINT64_MAX, 1, &crc), -EINVAL);
  CHECK_EQUAL (lhb_file_crc64 (fd, 1, INT64_MAX, &crc), -EINVAL);
  write_random (fd, 0, BLOCK);
  CHECK (snprintf (path, sizeof path, "/proc/self/fd/%d", fd) > 0);
  write_only = open (path, O_WRONLY | O_CLOEXEC);
  CHECK_EQUAL (lhb_file_crc64 (write_only, 0, BLOCK, &crc), -EBADF);
  CHECK_EQUAL (crc, 42);
  close (write_only);
  close (fd);
}

static const struct lhb_test tests[] = {
  LHB_TEST (empty_and_all_hole_files_have_no_extents),
  LHB_TEST (unsynced_data_is_rounded_to_blocks_and_joined),
  LHB_TEST (unwritten_extents_are_data_up_to_the_end_of_the_file),
  LHB_TEST (touching_extents_are_joined_over_batches),
  LHB_TEST (fragmented_file_is_the_same_at_once_and_in_pieces),
  LHB_TEST (answer_begins_with_the_block_of_the_offset),
  LHB_TEST (extents_refuse_what_they_can_not_do),
  LHB_TEST (crc_has_the_check_value_and_can_be_continued),
  LHB_TEST (crc_of_zeros_is_that_of_zero_bytes),
  LHB_TEST (file_crc_equals_the_crc_of_its_bytes),
  LHB_TEST (file_crc_of_holes_equals_explicit_zeros),
  LHB_TEST (file_crc_of_a_fragmented_file),
  LHB_TEST (file_crc_through_direct_io),
  LHB_TEST (file_crc_without_fiemap_reads_everything),
  LHB_TEST (file_crc_behind_the_end_counts_zeros),
  LHB_TEST (file_crc_of_a_huge_hole_is_free),
  LHB_TEST (file_crc_failure_leaves_the_running_value),
};

LHB_TEST_MAIN (tests)
