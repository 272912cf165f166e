"""vdiskfs: every write to a virtual disk, kept, second by second, as a directory.

The words
    A *disk* is one protected image: an identity, a size, a history. A *page* is 4 KiB, the
    unit of tracking; a *chunk* 64 KiB, the unit of storage. An *epoch* is the writes between
    two *seals*; a *delta* the immutable object that holds what an epoch changed; a *recovery
    point* an epoch whose chain of deltas is stored in the *vault*. A *generation* is one
    writer's line of deltas. *Suspect* pages are those of which it is not known whether the
    vault holds them; a *pass* finds out.

The modules, from the top
    daemon        builds the objects, one nursery, shuts down in order
    plain         the same without disks, where daemons keep dying
    watching      events, sinks and metrics of one mount, put together
    serving       a mount while it is served: announced, handed over, ended
    control, api  what the control socket offers; HTTP over a Unix socket
    fs            pyfuse3's handlers: look-ups, errnos
    takeover      a connection, from one daemon to the next
    unlocking     how a mount opens its vault
    failoverapi   the socket's routes for failovers    failovercontrol  what they call
    jobapi        the routes for jobs    jobcontrol  what they call
    watchapi      the routes for events and metrics    exporter  the metrics' port
    repairapi     the routes for repairs    repairing  the vault, healed from what is here
    requests      bodies that are read, errors that are answered
    handovers     a disk is let go, for another site
    stopping      this host's own machines are stopped    restarting  and started again
    applicationpoints  what uses a disk rests while it is sealed
    quiesce       guests and file systems: frozen, and thawed whatever happens
    browse        recovery points as the tree shows them
    monitor       the documents of status    metrics  what Prometheus reads
    watch         what begins to be wrong with a disk, and what is over
    sinks         who is told: the journal, mail, a webhook
    groups        consistency groups: who is sealed with whom    groupview  their documents
    heartbeat     the site is alive, and the vault is the same
    maintenance   policies at work: settings, thinning, collecting
    protection    which files are disks
    imageevents   what the C core says of a disk's image
    room          what is kept here gives way to images on a full file system
    diskfiles     what is known of the source's files, and what follows when they come and go
    plaintree     the names of a mount that is served plainly
    untracked     images that nobody tracks
    earlydisk     a disk that guests go on with, and that waits to be started
    enrolment     a file becomes a disk, or is refused
    diskjobs      the jobs of disks: enabled, finalized, resynchronized
    finalizing    what is done once, when the first replication has ended
    disk          one protected disk, from start to stop
    together      several disks, sealed at one instant
    storing       all of a disk, in the vault
    tree          the names of the mount
    replicator    when to seal, when a pass runs, what is given back
    suspects      which pages the vault may lack    shipping  the spool into the vault
    stride        how long an epoch lasts
    ownership     which line of the vault a disk writes, and by what right
    lineclaims    what a site claims of a disk, and remembers of it
    machines      virtual machines: their definitions, and what runs them
    leftovers     what a spool holds that does not follow: a branch
    ownernote     what a disk knows here of who owns it
    liveness      whether the owner of a disk still runs
    twin          whether a file is a copy of a disk that the vault has
    passes        what suspect pages hold
    failover      writable copies of points, and what is done with them
    homeward      a local image, brought from one point to another
    prover        points proven in the background
    proving       points read back, and their file systems checked
    hydration     images of points; hydrator: one image, filled when it is read
    catalog       what the vault holds: disks, points; publishing, joining, checking
    spool         deltas that wait for the vault
    image         a live image: seal, capture, forget
    point         a disk at one epoch: reading, restoring, comparing
    delta         the byte layout
    resync        whether a disk is to be resynchronized, and when
    health        how a disk fares, and waiting to try again
    store         objects by name: a folder, Azure Blob
    state         what survives the daemon on this host
    registry      the mounts of this host
    sealed        a store whose objects are encrypted, around another one
    crypto        keys: wrapped, found, derived
    native        the C core (native/): data requests, tracking; the only file that touches ffi
    config, quiesceconfig, window, units, errors, running
    watchsettings the tables of the configuration that say what is watched
    tablerules    which keys a table of it may have, and what each may be
    ratelimit     bytes per second, shared by all who take from it
    events        what has happened at a mount, for people and their programs
    jobs          the long work of a mount: steps, times, progress, outcome
    sqlitefile    a small SQLite file: sound, or set aside
    crash         crash hooks, for tests
    fdstore       descriptors that outlive the daemon
    keeper        the process that keeps them, and starts the daemon again
    daemonlog     what the daemon has to say, within bounds
    ready         the one line that whoever starts a daemon waits for

The way of one write
    A guest's WRITE is read from /dev/fuse by a thread of the C core, which looks up the
    image that ``native.Core.attach`` gave for the node. It takes a ticket of the running
    epoch; under the lock of its chunks it copies pages that are frozen and not yet preserved,
    marks its pages, writes, and answers. The first mark of an epoch is an event:
    ``replicator.Replicator.touched`` wakes the sealing task. An epoch interval later
    ``replicator.flip_held`` seals (``native.seal``, in C ``vdf_seal_images``): later
    tickets belong to the next epoch. ``image.LiveImage.capture`` reads the frozen pages
    (``native.PageReader.next``, in C ``vdf_capture_next``), ``delta.DeltaWriter.add`` compresses
    them, ``delta.DeltaWriter.finish`` makes the delta durable in the spool, and only then
    ``native.Image.forget`` lets the frozen pages go. The shipping task hands the delta to
    ``catalog.DiskLog.publish``: segments first, then the slot by ``store.Store.create``. When
    the slot exists the recovery point exists, and ``delta.remove_spooled`` empties the spool.

The way of one recovery point
    ``browse.Browser.points`` lists it and ``browse.Browser.open_point`` opens it:
    ``catalog.DiskLog.open`` finds the chain of deltas and checks that each follows the one
    before, ``hydration.PointImages.open`` lays a lazy image over an empty sparse file. A READ
    of what is not there is parked in C and becomes an event; ``hydrator.Hydrator.answer``
    maps the region (``point.PointReader.map_pages``), fetches and verifies the pages
    (``point.PointReader.read_pages``), fills them in (``native.Image.fill``) and lets the read
    run again (``native.Image.answer``).
"""

import os

# numpy's OpenBLAS starts a thread for each processor, which spins before it sleeps: a fifth of
# the time of a short command. Nothing here multiplies matrices.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
