/* nbdkit plugin: volumes that a running engine serves, over its Unix socket.
 *
 *   nbdkit lhblock volume=db data-dir=/var/lib/lhblock
 *
 * docs/operating/nbdkit.md is its manual.
 */

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include "lhb_link.h"

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL
#define RETRY_S 60

static char *volume;            /* NULL: whatever clients ask for */
static char *socket_path;
static unsigned retry_s = RETRY_S;

/* One client. */
struct client {
  char *name;
  struct lhb_link link;
};

/* ---- Settings. */

static int
set_path (char **path, const char *key, const char *value, const char *below)
{
  char *absolute;
  int n;

  if (*path)
    {
      nbdkit_error ("lhblock: %s=: say one of socket= and data-dir=, once",
                    key);
      return -1;
    }
  absolute = nbdkit_absolute_path (value);
  if (absolute == NULL)
    return -1;
  n = asprintf (path, "%s%s", absolute, below);
  free (absolute);
  if (n != -1)
    return 0;
  *path = NULL;
  nbdkit_error ("lhblock: no memory");
  return -1;
}

static int
lhblock_config (const char *key, const char *value)
{
  if (strcmp (key, "volume") == 0)
    {
      if (!*value || strlen (value) > LHB_SESSION_NAME_BYTES_MAX)
        {
          nbdkit_error ("lhblock: volume= needs a name");
          return -1;
        }
      free (volume);
      volume = strdup (value);
      return volume ? 0 : -1;
    }
  if (strcmp (key, "socket") == 0)
    return set_path (&socket_path, key, value, "");
  if (strcmp (key, "data-dir") == 0)
    return set_path (&socket_path, key, value, "/run/nbd.sock");
  if (strcmp (key, "retry") == 0)
    {
      if (nbdkit_parse_unsigned ("retry", value, &retry_s) == -1)
        return -1;
      if (retry_s <= LHB_LINK_RETRY_S_MAX)
        return 0;
      nbdkit_error ("lhblock: retry=%s: a number from 0 to %d is needed",
                    value, LHB_LINK_RETRY_S_MAX);
      return -1;
    }
  nbdkit_error ("lhblock: unknown parameter '%s'", key);
  return -1;
}

static int
lhblock_config_complete (void)
{
  const char *data_dir = getenv ("LHBLOCK_DATA_DIR");

  if (socket_path == NULL && data_dir)
    return set_path (&socket_path, "data-dir", data_dir, "/run/nbd.sock");
  if (socket_path)
    return 0;
  nbdkit_error ("lhblock: say where the server is, with socket=PATH or "
                "data-dir=DIR");
  return -1;
}

static void
lhblock_unload (void)
{
  free (volume);
  free (socket_path);
}

/* Say why there is no export. */
static void
explain (const char *name, const struct lhb_export *told, int err)
{
  if (*told->said)
    nbdkit_error ("lhblock: %s: %s", socket_path, told->said);
  else if (err == -ENOENT || err == -ECONNREFUSED)
    nbdkit_error ("lhblock: %s: no server is there; 'lhblock serve' starts "
                  "one, and the plugin lhblock.py serves volumes without",
                  socket_path);
  else
    nbdkit_error ("lhblock: %s: %s: %s", socket_path, name, strerror (-err));
  nbdkit_set_error (-err);
}

static struct client *
make_client (const char *name)
{
  struct client *client = malloc (sizeof *client);
  int err = -ENOMEM;

  if (client)
    client->name = strdup (name);
  if (client == NULL || client->name == NULL)
    {
      free (client);
      nbdkit_error ("lhblock: no memory");
      return NULL;
    }
  err = lhb_link_open (&client->link, socket_path, client->name, retry_s);
  if (err == 0)
    return client;
  explain (name, &client->link.export, err);
  free (client->name);
  free (client);
  return NULL;
}

static void
lhblock_close (void *handle)
{
  struct client *client = handle;

  lhb_link_close (&client->link);
  free (client->name);
  free (client);
}

/* Find out, while there is a terminal to tell it to, whether there is such a
 * volume. */
static int
lhblock_get_ready (void)
{
  struct client *client;

  if (volume == NULL)
    return 0;
  client = make_client (volume);
  if (client == NULL)
    return -1;
  lhblock_close (client);
  return 0;
}

/* ---- Exports. */

/* The volume that was named, and its snapshots: a server may have others,
 * which were not asked for. */
static bool
is_offered (const char *name)
{
  size_t bytes;

  if (volume == NULL)
    return true;
  bytes = strlen (volume);
  return strncmp (name, volume, bytes) == 0
         && (name[bytes] == 0
             || (name[bytes] == '@' && strchr (volume, '@') == NULL));
}

static int
list_one (void *data, const char *name, const char *description)
{
  if (!is_offered (name))
    return 0;
  return nbdkit_add_export (data, name, *description ? description : NULL);
}

static int
lhblock_list_exports (int readonly, int is_tls, struct nbdkit_exports *exports)
{
  int err = lhb_session_list (socket_path, list_one, exports);

  (void) readonly;
  (void) is_tls;
  if (err < -1)
    nbdkit_error ("lhblock: %s: %s", socket_path, strerror (-err));
  return err ? -1 : 0;
}

static const char *
lhblock_default_export (int readonly, int is_tls)
{
  (void) readonly;
  (void) is_tls;
  return volume ? volume : "";
}

static void *
lhblock_open (int readonly)
{
  const char *name = nbdkit_export_name ();

  (void) readonly;
  if (name == NULL)
    return NULL;
  if (!*name && volume)
    name = volume;
  if (is_offered (name))
    return make_client (name);
  nbdkit_error ("lhblock: no export '%s' here, only '%s'", name, volume);
  nbdkit_set_error (ENOENT);
  return NULL;
}

/* ---- What an export can do. */

static const struct lhb_export *
told (void *handle)
{
  return &((struct client *) handle)->link.export;
}

static int64_t
lhblock_get_size (void *handle)
{
  return (int64_t) told (handle)->size;
}

static int
lhblock_block_size (void *handle, uint32_t *least, uint32_t *preferred,
                    uint32_t *most)
{
  *least = told (handle)->block_min;
  *preferred = told (handle)->block_preferred;
  *most = told (handle)->block_max;
  return 0;
}

static const char *
lhblock_export_description (void *handle)
{
  const char *text = told (handle)->description;

  return *text ? text : NULL;
}

static int
has (void *handle, unsigned flag)
{
  return (told (handle)->flags & flag) != 0;
}

static int
lhblock_can_write (void *handle)
{
  return !has (handle, NBD_FLAG_READ_ONLY);
}

static int
lhblock_can_flush (void *handle)
{
  return has (handle, NBD_FLAG_SEND_FLUSH);
}

static int
lhblock_is_rotational (void *handle)
{
  return has (handle, NBD_FLAG_ROTATIONAL);
}

static int
lhblock_can_trim (void *handle)
{
  return has (handle, NBD_FLAG_SEND_TRIM);
}

static int
lhblock_can_zero (void *handle)
{
  return has (handle, NBD_FLAG_SEND_WRITE_ZEROES);
}

static int
lhblock_can_fast_zero (void *handle)
{
  return has (handle, NBD_FLAG_SEND_FAST_ZERO);
}

static int
lhblock_can_fua (void *handle)
{
  return has (handle, NBD_FLAG_SEND_FUA) ? NBDKIT_FUA_NATIVE
                                         : NBDKIT_FUA_NONE;
}

static int
lhblock_can_multi_conn (void *handle)
{
  return has (handle, NBD_FLAG_CAN_MULTI_CONN);
}

static int
lhblock_can_cache (void *handle)
{
  return has (handle, NBD_FLAG_SEND_CACHE) ? NBDKIT_CACHE_NATIVE
                                           : NBDKIT_CACHE_NONE;
}

static int
lhblock_can_extents (void *handle)
{
  return told (handle)->has_extents;
}

/* ---- Requests. */

static int
call (void *handle, struct lhb_request *request)
{
  int err = lhb_link_call (&((struct client *) handle)->link, request);

  if (err == 0)
    return 0;
  nbdkit_debug ("lhblock: command %u of %u bytes at %llu: %s", request->type,
                request->bytes, (unsigned long long) request->offset,
                strerror (-err));
  nbdkit_set_error (-err);
  return -1;
}

static uint16_t
fua (uint32_t flags)
{
  return flags & NBDKIT_FLAG_FUA ? NBD_CMD_FLAG_FUA : 0;
}

static int
lhblock_pread (void *handle, void *data, uint32_t count, uint64_t offset,
               uint32_t flags)
{
  struct lhb_request request = {
    .type = NBD_CMD_READ, .bytes = count, .offset = offset, .in = data,
  };

  (void) flags;
  return call (handle, &request);
}

static int
lhblock_pwrite (void *handle, const void *data, uint32_t count,
                uint64_t offset, uint32_t flags)
{
  struct lhb_request request = {
    .type = NBD_CMD_WRITE, .flags = fua (flags),
    .bytes = count, .offset = offset, .out = data,
  };

  return call (handle, &request);
}

static int
lhblock_flush (void *handle, uint32_t flags)
{
  struct lhb_request request = { .type = NBD_CMD_FLUSH };

  (void) flags;
  return call (handle, &request);
}

static int
lhblock_trim (void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
  struct lhb_request request = {
    .type = NBD_CMD_TRIM, .flags = fua (flags),
    .bytes = count, .offset = offset,
  };

  return call (handle, &request);
}

static int
lhblock_zero (void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
  struct lhb_request request = {
    .type = NBD_CMD_WRITE_ZEROES, .flags = fua (flags),
    .bytes = count, .offset = offset,
  };

  if (!(flags & NBDKIT_FLAG_MAY_TRIM))
    request.flags |= NBD_CMD_FLAG_NO_HOLE;
  if (flags & NBDKIT_FLAG_FAST_ZERO)
    request.flags |= NBD_CMD_FLAG_FAST_ZERO;
  return call (handle, &request);
}

static int
lhblock_cache (void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
  struct lhb_request request = {
    .type = NBD_CMD_CACHE, .bytes = count, .offset = offset,
  };

  (void) flags;
  return call (handle, &request);
}

static int
lhblock_extents (void *handle, uint32_t count, uint64_t offset, uint32_t flags,
                 struct nbdkit_extents *extents)
{
  struct lhb_extent found[LHB_LINK_EXTENTS_MAX];
  struct lhb_request request = {
    .type = NBD_CMD_BLOCK_STATUS, .bytes = count, .offset = offset,
    .extents = found,
  };

  if (flags & NBDKIT_FLAG_REQ_ONE)
    request.flags = NBD_CMD_FLAG_REQ_ONE;
  if (call (handle, &request) == -1)
    return -1;
  for (uint32_t i = 0; i < request.got; i++)
    {
      /* NBD and nbdkit have the same bits. */
      if (nbdkit_add_extent (extents, offset, found[i].bytes, found[i].state)
          == -1)
        return -1;
      offset += found[i].bytes;
    }
  return 0;
}

static struct nbdkit_plugin plugin = {
  .name = "lhblock",
  .longname = "lhblock volumes",
  .description = "volumes that a running lhblock serves",
  .unload = lhblock_unload,
  .config = lhblock_config,
  .config_complete = lhblock_config_complete,
  .config_help
  = "volume=NAME[@SNAPSHOT]  Volume, or snapshot; default: what clients ask.\n"
    "data-dir=DIR            Where volumes are kept; as lhblock's --data-dir.\n"
    "socket=PATH             The server's Unix socket, if it is another.\n"
    "retry=SECONDS           How long requests wait for a server that went\n"
    "                        away (default 60).",
  .magic_config_key = "volume",
  .get_ready = lhblock_get_ready,
  .list_exports = lhblock_list_exports,
  .default_export = lhblock_default_export,
  .open = lhblock_open,
  .close = lhblock_close,
  .get_size = lhblock_get_size,
  .block_size = lhblock_block_size,
  .export_description = lhblock_export_description,
  .can_write = lhblock_can_write,
  .can_flush = lhblock_can_flush,
  .is_rotational = lhblock_is_rotational,
  .can_trim = lhblock_can_trim,
  .can_zero = lhblock_can_zero,
  .can_fast_zero = lhblock_can_fast_zero,
  .can_fua = lhblock_can_fua,
  .can_multi_conn = lhblock_can_multi_conn,
  .can_cache = lhblock_can_cache,
  .can_extents = lhblock_can_extents,
  .pread = lhblock_pread,
  .pwrite = lhblock_pwrite,
  .flush = lhblock_flush,
  .trim = lhblock_trim,
  .zero = lhblock_zero,
  .cache = lhblock_cache,
  .extents = lhblock_extents,
};

NBDKIT_REGISTER_PLUGIN (plugin)
