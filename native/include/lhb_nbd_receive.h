/* Receiving half of a connection: bytes to requests. */
#ifndef LHB_NBD_RECEIVE_H
#define LHB_NBD_RECEIVE_H

#include "lhb_nbd.h"

/* Read what the socket has, within the turn's limit, and start every complete
 * request.  Stops early when slots or slabs run out ('starved'); then the
 * next reply that is sent makes room. */
void lhb_nbd_pump (struct lhb_nbd_connection *connection);
/* End the connection: no more requests are read.  The first reason counts. */
void lhb_nbd_give_up (struct lhb_nbd_connection *connection, int reason);

#endif
