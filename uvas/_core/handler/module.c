/* module.c: the extension module _handler: its functions, its type, and who is told of forks. */
#include "handler.h"

static int execute(PyObject *module) {
    if (watch_forks() != 0) {
        PyErr_NoMemory();
        return -1;
    }
    if (PyModule_AddFunctions(module, asking_methods) < 0 || PyModule_AddFunctions(module, capsule_methods) < 0) {
        return -1;
    }
    PyObject *type = PyType_FromSpec(&under_spec);
    int rc = type ? PyModule_AddType(module, (PyTypeObject *)type) : -1;
    Py_XDECREF(type);
    return rc;
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
    .m_name = "uvas._core._handler",
    .m_doc = "NumPy asks an arena for the memory of its arrays.",
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__handler(void) {
    return PyModuleDef_Init(&definition);
}
