/* Replays the seeds of a fuzz target, so that what fuzzing once found stays
 * found, with every sanitizer and without clang. */
#ifndef LHB_CORPUS_H
#define LHB_CORPUS_H

#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <sys/stat.h>

#include "../fuzz/lhb_fuzz.h"
#include "lhb_test.h"

static inline void
corpus_replay_file (int dir, const char *name)
{
  int fd = openat (dir, name, O_RDONLY | O_CLOEXEC);
  struct stat st;
  uint8_t *data;

  CHECK (fd >= 0 && fstat (fd, &st) == 0);
  data = malloc ((size_t) st.st_size + 1);
  CHECK (data != NULL);
  CHECK_EQUAL (read (fd, data, (size_t) st.st_size), st.st_size);
  close (fd);
  printf ("# %s\n", name);
  fflush (stdout);
  CHECK_EQUAL (LLVMFuzzerTestOneInput (data, (size_t) st.st_size), 0);
  free (data);
}

/* Every file of ../fuzz/corpus/NAME beside 'source'.  There must be some. */
static inline void
corpus_replay (const char *source, const char *name)
{
  char path[PATH_MAX];
  struct dirent *entry;
  int files = 0;
  DIR *dir;

  CHECK (strlen (source) + strlen (name) + 32 < sizeof path);
  strcpy (path, source);
  strcpy (strrchr (path, '/'), "/../fuzz/corpus/");
  strcat (path, name);
  dir = opendir (path);
  CHECK (dir != NULL);
  while ((entry = readdir (dir)) != NULL)
    if (entry->d_name[0] != '.')
      {
        corpus_replay_file (dirfd (dir), entry->d_name);
        files++;
      }
  closedir (dir);
  CHECK (files > 0);
}

#endif
