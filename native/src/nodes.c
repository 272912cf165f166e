/* nodes.c - which image answers for a node. */
#include "internal.h"

#include <stdlib.h>

static vdf_node **bucket(vdf_core *core, uint64_t nodeid)
{
    return &core->node[nodeid % VDF_NODE_BUCKETS];
}

int vdf_core_attach(vdf_core *core, uint64_t nodeid, vdf_image *image)
{
    vdf_node *node = calloc(1, sizeof *node);
    vdf_image *old = NULL;

    if (node == NULL)
        return -ENOMEM;
    node->nodeid = nodeid;
    node->image = image;
    vdf_image_ref(image);
    pthread_rwlock_wrlock(&core->nodes_lock);
    vdf_node **at = bucket(core, nodeid);
    vdf_node *found = *at;
    while (found != NULL && found->nodeid != nodeid)
        found = found->next;
    if (found != NULL) {
        old = found->image;
        found->image = image;
    } else {
        node->next = *at;
        *at = node;
        node = NULL;
    }
    pthread_rwlock_unlock(&core->nodes_lock);
    free(node);
    vdf_image_unref(old);
    return 0;
}

int vdf_core_detach(vdf_core *core, uint64_t nodeid)
{
    vdf_node *node = NULL;

    pthread_rwlock_wrlock(&core->nodes_lock);
    for (vdf_node **at = bucket(core, nodeid); *at != NULL; at = &(*at)->next) {
        if ((*at)->nodeid == nodeid) {
            node = *at;
            *at = node->next;
            break;
        }
    }
    pthread_rwlock_unlock(&core->nodes_lock);
    if (node == NULL)
        return -ENOENT;
    vdf_image_unref(node->image);
    free(node);
    return 0;
}

vdf_image *vdf_nodes_find(vdf_core *core, uint64_t nodeid)
{
    vdf_image *image = NULL;

    pthread_rwlock_rdlock(&core->nodes_lock);
    for (vdf_node *node = *bucket(core, nodeid); node != NULL; node = node->next) {
        if (node->nodeid == nodeid) {
            image = node->image;
            vdf_image_ref(image);
            break;
        }
    }
    pthread_rwlock_unlock(&core->nodes_lock);
    return image;
}

void vdf_nodes_clear(vdf_core *core)
{
    for (size_t i = 0; i < VDF_NODE_BUCKETS; i++) {
        while (core->node[i] != NULL) {
            vdf_node *node = core->node[i];
            core->node[i] = node->next;
            vdf_image_unref(node->image);
            free(node);
        }
    }
}
