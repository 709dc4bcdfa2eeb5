/* module.c: the extension module _allocation: its types. */
#include "allocation.h"

static int add_type(PyObject *module, PyType_Spec *spec) {
    PyObject *type = PyType_FromSpec(spec);
    int rc = type ? PyModule_AddType(module, (PyTypeObject *)type) : -1;
    Py_XDECREF(type);
    return rc;
}

static int execute(PyObject *module) {
    PyType_Spec *specs[] = {&core_spec, &block_spec, &allocator_spec, &hold_spec};
    for (size_t i = 0; i < sizeof specs / sizeof *specs; i++) {
        if (add_type(module, specs[i]) < 0) {
            return -1;
        }
    }
    return 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)execute},
#ifdef Py_GIL_DISABLED
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "uvas._core._allocation",
    .m_doc = "Blocks of an arena as Python objects.",
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__allocation(void) {
    return PyModuleDef_Init(&definition);
}
